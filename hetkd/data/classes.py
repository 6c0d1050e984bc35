"""Class names: those of a data set, and how its labels become those of a model or of other data."""

from collections.abc import Mapping, Sequence
from typing import Any

Names = Sequence[tuple[str, ...]]


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes, in the order of its labels, or ``None`` where it has none.

    Folders, torchvision's data sets (``classes``) and Hugging Face's (``ClassLabel``) have them; so do their subsets.
    """
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        return class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    if names is None:
        features = getattr(dataset, "features", None)
        columns = features.values() if isinstance(features, Mapping) else ()
        labels = [column for column in columns if type(column).__name__ == "ClassLabel"]
        names = labels[0].names if len(labels) == 1 else None
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def match(names: Sequence[str], targets: Names) -> list[int | None]:
    """Return for each name the number of the target that has it among its names, or ``None``; case does not count.

    Example:
        >>> match(["Tench", "goldfish", "cat"], [("n01443537", "goldfish"), ("n01440764", "tench")])
        [1, 0, None]
    """
    known: dict[str, int | None] = {}
    for number, synonyms in enumerate(targets):
        for synonym in dict.fromkeys(map(_plain, synonyms)):
            known[synonym] = None if synonym in known else number  # a name of two classes tells none of them
    for number, synonyms in enumerate(targets):
        known[_plain(synonyms[0])] = number
    return [known.get(_plain(name)) for name in names]


def label_map(names: Sequence[str], targets: Sequence[str], what: str, other: str) -> tuple[list[int], list[str]]:
    """Return the number of each class among the targets, and the targets that are missing.

    Args:
        names: Names of the classes of the data ``what``.
        targets: Names of the classes in the order of the student's outputs, those of ``other``.
        what: Name of the argument, for errors.
        other: The same, of the targets.

    Raises:
        ValueError: If a name is none of the targets.
    """
    found = match(names, [(name,) for name in targets])
    strange = [name for name, number in zip(names, found, strict=True) if number is None]
    if strange:
        raise ValueError(
            f"{what} has classes that {other} lacks: {_listed(strange)}; {other} has {_listed(list(targets))}. Rename "
            "or remove the folders."
        )
    numbers = [number for number in found if number is not None]
    return numbers, [name for number, name in enumerate(targets) if number not in numbers]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
