"""Data sets of Hugging Face's hub, for the recipes."""

from typing import Any


def hub_splits(words: str, argument: str, *, streaming: bool = False) -> tuple[Any, Any]:
    """Returns the splits of ``hf:NAME`` to train and to evaluate on: validation images, or else the test images.

    Raises:
        SystemExit: If datasets is not installed, or a split is missing.
    """
    datasets = import_datasets(words, argument)
    found = datasets.load_dataset(words.removeprefix("hf:"), streaming=streaming)
    val = next((found[split] for split in ("validation", "val", "test") if split in found), None)
    if "train" not in found or val is None:
        raise SystemExit(f"{argument} {words!r} has the splits {list(found)}; it needs train and validation or test.")
    return found["train"], val


def import_datasets(words: str, argument: str) -> Any:
    """Imports Hugging Face's datasets, which the recipes do without where they can.

    Raises:
        SystemExit: If it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise SystemExit(f"{argument} {words!r} needs Hugging Face's datasets: pip install datasets.") from None
    return datasets
