"""Folders of images: one folder a class, or images alone."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hetkd.data.pictures import open_picture

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_SPLIT = re.compile(  # train2017, test_set, ...
    r"(train|training|trainval|val|valid|validation|eval|evaluation|dev|test|testing)"
    r"[\W_]*(set|split|data|images)?[\W_]*\d*",
    re.IGNORECASE,
)
_FOLD = re.compile(r"(fold|part|split|cv|subset|labell?ed|unlabell?ed)[\W_]*\d*", re.IGNORECASE)
_LITTER = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
_LITTER |= {"thumbs.db", "desktop.ini"}


class ImageFiles(Dataset[Any]):
    """The images of a folder without classes, in the order of their names."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return open_picture(self.paths[index])


class ClassFolders(Dataset[Any]):
    """Images in one folder a class; labels follow the alphabetical order of the folders.

    Images in subfolders of a class count. Hidden folders and what systems leave behind (``__MACOSX``, ``@eaDir``, ...)
    do not, at any depth, nor do links that lead back to a folder that holds them.

    Args:
        path: The folder of the class folders.
        what: Name of the argument, for errors.

    Attributes:
        classes: Names of the class folders.
        samples: Path and label of each image.
        notes: What a person should know of it.

    Raises:
        ValueError: If there are no classes, one is empty, or the folder holds splits instead.
    """

    def __init__(self, path: Path, what: str) -> None:
        folders = subfolders(path)
        names = [folder.name for folder in folders]
        _refuse_splits(path, what, names)
        self.path, self.classes = path, names
        self.samples: list[tuple[str, int]] = []
        left_out: Counter[str] = Counter()
        inner: dict[str, set[str]] = {}
        for label, folder in enumerate(folders):
            files = list(_files(folder))
            images = [str(file) for file in files if is_image(file)]
            left_out.update(file.suffix.lower() or "no extension" for file in files if not is_image(file))
            self.samples += [(image, label) for image in images]
            inner[folder.name] = _inner_folders(folder, images)
        alike = _alike_inside(inner)
        if alike and all(_FOLD.fullmatch(name) for name in alike):
            raise ValueError(f"{_instead(path, what, alike)} If they are classes, rename them.")
        empty = [name for name in names if not inner[name]]
        if not names or len(empty) == len(names):
            raise ValueError(
                f"{what}={str(path)!r} must hold one folder of images a class, or images alone"
                + (f"; files with {_counted(left_out)} are left out." if left_out else ".")
            )
        if empty:
            raise ValueError(
                f"{what}={str(path)!r} has class folders without images: {', '.join(empty)}. Remove them, or put "
                f"images there ({', '.join(sorted(EXTENSIONS))})."
            )
        beside = [entry.name for entry in visible(path) if is_image(entry) and entry.is_file()]
        self.notes = _notes(what, names, left_out, beside)
        if alike:
            self.notes.append(f"{what}: the classes {_some(alike, ' and ')} hold subfolders of the same names")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return open_picture(path), label


def open_folder(path: Path, what: str) -> ImageFiles | ClassFolders:
    """Open a folder of class folders, or of images alone.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: See `ClassFolders`.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{what}={str(path)!r} is no folder.")
    images = [entry for entry in visible(path) if is_image(entry)]
    if images and not subfolders(path):
        return ImageFiles(images)
    return ClassFolders(path, what)


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, sorted, without what is hidden or litter.

    Raises:
        ValueError: If there are none.
    """
    found = [path for path in _files(folder) if is_image(path)]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(EXTENSIONS))}).")
    return found


def is_image(file: Path) -> bool:
    """Say whether a file is an image, by its name."""
    return file.suffix.lower() in EXTENSIONS


def visible(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, without what is hidden or left behind by systems."""
    return sorted(entry for entry in folder.iterdir() if not _is_litter(entry.name))


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted."""
    return [entry for entry in visible(folder) if entry.is_dir() and not _leads_back(entry, folder)]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the visible files of a folder and its visible subfolders, as torchvision orders them."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [n for n in folders if not _is_litter(n) and not _leads_back(Path(root, n), folder)]
        found.append((root, names))
    for root, names in sorted(found):
        yield from (Path(root, name) for name in sorted(names) if not _is_litter(name))


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _leads_back(entry: Path, top: Path) -> bool:
    """Say whether a link leads to a folder on the way from ``top`` to it, or to one that holds such a folder."""
    if not entry.is_symlink():
        return False
    target = entry.resolve()
    return any(step.resolve().is_relative_to(target) for step in entry.parents if step.is_relative_to(top))


def _inner_folders(folder: Path, images: Iterable[str]) -> set[str]:
    """Return the names of the subfolders of a class that hold its images; ``""`` is the class folder itself."""
    start = len(str(folder)) + 1
    return {image[start:].rpartition(os.sep)[0].partition(os.sep)[0] for image in images}


def _refuse_splits(path: Path, what: str, names: list[str]) -> None:
    """Refuse folders with the names of splits; one such name beside others may be a class, as a train is."""
    splits = [name for name in names if _SPLIT.fullmatch(name)]
    if splits and len(splits) >= min(2, len(names)):
        raise ValueError(f"{_instead(path, what, splits)} If they are classes, rename them.")


def _alike_inside(inner: Mapping[str, set[str]]) -> list[str]:
    """Return the folders without images of their own whose subfolders are mostly those of others, as of folds.

    Args:
        inner: By its name the subfolders of each folder, see `_inner_folders`.
    """
    nested = {name: folders for name, folders in inner.items() if folders and "" not in folders}
    often = Counter(chain.from_iterable(nested.values()))
    alike = [name for name, own in nested.items() if 2 * sum(often[each] > 1 for each in own) >= len(own)]
    return alike if len(alike) > 1 and 2 * len(alike) >= len(inner) else []


def _instead(path: Path, what: str, splits: list[str]) -> str:
    """Return the part of an error that says which call was meant."""
    train = next((name for name in splits if name.lower().startswith("train")), splits[0])
    others = [name for name in splits if name != train]
    val = next((name for name in others if not name.lower().startswith("test")), next(iter(others), None))
    call = f"call fit({str(path / train)!r}" + (f", {str(path / val)!r})" if val else ")")
    cure = call if what == "train" else f"give {str(path / (val or train))!r}"
    return f"{what}={str(path)!r} holds {_some(splits, ' and ')} instead of classes: {cure}."


def _notes(what: str, names: list[str], left_out: Counter[str], beside: list[str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{what}: files with {_counted(left_out)} are left out")
    if beside:
        notes.append(f"{what}: {len(beside)} images beside the class folders are left out: {_some(beside, ', ')}")
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != names:
        first = next(index for index, (a, b) in enumerate(zip(names, sorted(names, key=int), strict=True)) if a != b)
        notes.append(f"{what}: class folders sort as text: label {first} is folder {names[first]!r}; pad with zeros")
    return notes


def _some(names: list[str], separator: str) -> str:
    return separator.join(names[:5]) + (f"{separator}... ({len(names)})" if len(names) > 5 else "")


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{extension} ({count})" for extension, count in left_out.most_common())
