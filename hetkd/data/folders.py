"""Folders of images: one folder a class, or images alone."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hetkd.data.pictures import open_picture

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LITTER = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
_LITTER_FILES = {"thumbs.db", "desktop.ini"}


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

    Hidden folders and what systems leave behind (``__MACOSX``, ``@eaDir``, ...) are no classes.

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
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_litter(entry))
        names = [folder.name for folder in folders]
        _refuse_splits(path, what, names)
        self.path, self.classes = path, names
        self.samples: list[tuple[str, int]] = []
        left_out: Counter[str] = Counter()
        for label, folder in enumerate(folders):
            for file in _files(folder):
                if file.suffix.lower() in EXTENSIONS:
                    self.samples.append((str(file), label))
                else:
                    left_out[file.suffix.lower() or "no extension"] += 1
        empty = [name for label, name in enumerate(names) if not any(label == own for _, own in self.samples)]
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
        self.notes = _notes(what, names, left_out)

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
    entries = [entry for entry in sorted(path.iterdir()) if not _is_litter(entry)]
    images = [entry for entry in entries if entry.suffix.lower() in EXTENSIONS]
    if images and not any(entry.is_dir() for entry in entries):
        return ImageFiles(images)
    return ClassFolders(path, what)


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its visible subfolders, sorted.

    Raises:
        ValueError: If there are none.
    """
    found = [path for path in _files(folder) if path.suffix.lower() in EXTENSIONS]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(EXTENSIONS))}).")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its visible subfolders, as torchvision orders them."""
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        inside = Path(root).relative_to(folder).parts
        if not any(part.startswith(".") for part in inside):
            yield from (path for path in (Path(root) / name for name in sorted(names)) if not _is_litter(path))


def _is_litter(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name.lower() in (_LITTER_FILES if entry.is_file() else _LITTER)


def _refuse_splits(path: Path, what: str, names: list[str]) -> None:
    splits = [name for name in names if name.lower() in _SPLITS]
    if not splits or len(splits) < len(names):
        return
    train = next((name for name in names if name.lower().startswith("train")), splits[0])
    val = next((name for name in splits if name != train), None)
    call = f"fit({str(path / train)!r}" + (f", {str(path / val)!r})" if val else ")")
    raise ValueError(f"{what}={str(path)!r} holds {' and '.join(splits)} instead of classes: call {call}.")


def _notes(what: str, names: list[str], left_out: Counter[str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{what}: files with {_counted(left_out)} are left out")
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != names:
        first = next(index for index, (a, b) in enumerate(zip(names, sorted(names, key=int), strict=True)) if a != b)
        notes.append(f"{what}: class folders sort as text: label {first} is folder {names[first]!r}; pad with zeros")
    return notes


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{extension} ({count})" for extension, count in left_out.most_common())
