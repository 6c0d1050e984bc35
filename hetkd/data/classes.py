"""Class names: those of a data set, and how its labels become those of a model or of other data."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

Names = Sequence[tuple[str, ...]]


def class_names(dataset: Any, label: str | None = None) -> list[str] | None:
    """Return the names of a data set's classes, in the order of its labels, or ``None`` where it has none.

    Folders, torchvision's data sets (``classes``, numbered by ``class_to_idx`` and ``target_transform``) and Hugging
    Face's (``ClassLabel``) have them; so do their subsets and sums, and loaders with PyTorch's own collation.

    Args:
        dataset: One of these.
        label: The column of labels, where there are several.
    """
    dataset = _within(dataset)
    if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):
        of_parts = [class_names(part, label) for part in dataset.datasets]
        return None if None in of_parts or differing_parts(dataset, label) else of_parts[0]
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return _names_of_column(features, label)
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)  # ImageNet's ids, which are unique
    if not isinstance(names, (list, tuple)) or not names:
        return None
    firsts = [name[0] if isinstance(name, (list, tuple)) and name else name for name in names]
    if not all(isinstance(name, str) for name in firsts):
        return None
    numbers = getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, Mapping) and all(name in numbers for name in firsts):
        return _numbered(firsts, [numbers[name] for name in firsts], dataset)
    return _numbered(firsts, list(range(len(firsts))), dataset)


def differing_parts(dataset: Any, label: str | None = None) -> str:
    """Return the names of the classes of each part of a sum, if parts give one number to different classes."""
    parts = getattr(_within(dataset), "datasets", ())
    known = [names for part in parts if (names := class_names(part, label)) is not None]
    alike = all(match(names, [(name,) for name in known[0]]) == list(range(len(known[0]))) for names in known)
    return "" if alike else "; ".join(_listed(names) for names in known)


def _within(dataset: Any) -> Any:
    """Return the data set within subsets and loaders; ``None`` for a loader whose own collation may change labels."""
    if isinstance(dataset, DataLoader):
        return _within(dataset.dataset) if dataset.collate_fn in (default_collate, default_convert) else None
    return _within(dataset.dataset) if hasattr(dataset, "indices") and hasattr(dataset, "dataset") else dataset


def _names_of_column(features: Mapping[str, Any], label: str | None) -> list[str] | None:
    columns = {name: x for name, x in features.items() if type(x).__name__ == "ClassLabel"}
    if label is None and len(columns) == 1:
        label = next(iter(columns))
    return list(columns[label].names) if label in columns else None


def _numbered(names: list[str], numbers: list[Any], dataset: Any) -> list[str] | None:
    """Return names in the order of the labels that come out; ``None`` where several classes get one number."""
    transform = getattr(dataset, "target_transform", None)
    try:
        labels = [int(number if transform is None else transform(number)) for number in numbers]
    except Exception:  # of the user's own function, which may want something else than a number
        return None
    if sorted(labels) != list(range(len(names))):
        return None
    return [name for _, name in sorted(zip(labels, names, strict=True))]


def match(names: Sequence[str], targets: Names) -> list[int | None]:
    """Return for each name the number of the target that has it among its names, or ``None``.

    Case, hyphens and underscores do not count, unless they tell two names apart.

    Example:
        >>> match(["Tench", "goldfish", "cat"], [("n01443537", "goldfish"), ("n01440764", "tench")])
        [1, 0, None]
        >>> match(["a", "A"], [("A",), ("a",)])
        [1, 0]
    """
    exact, alike = _numbers(targets, _composed), _numbers(targets, _plain)
    found = [exact.get(_composed(name)) for name in names]
    taken, count = set(found), Counter(map(_plain, names))
    for index, name in enumerate(names):
        number = alike.get(_plain(name))
        if found[index] is None and count[_plain(name)] == 1 and number not in taken:
            found[index] = number
    return found


def _numbers(targets: Names, form: Callable[[str], str]) -> dict[str, int | None]:
    """Return the number of the target with each name, its first before the others; ``None`` for a name of two."""
    known: dict[str, int | None] = {}
    firsts: dict[str, int | None] = {}
    for number, synonyms in enumerate(targets):
        for synonym in dict.fromkeys(map(form, synonyms)):
            known[synonym] = None if synonym in known else number
        first = form(synonyms[0])
        firsts[first] = None if first in firsts else number
    return known | firsts


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


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return " ".join(_composed(name).replace("_", " ").replace("-", " ").casefold().split())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
