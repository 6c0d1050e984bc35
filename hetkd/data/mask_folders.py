"""Folders of images and their masks, and the names of classes beside them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hetkd.data.folders import is_image, picture_files, subfolders, visible
from hetkd.data.pictures import open_picture

_LOSSY = {".jpg", ".jpeg"}
_IMAGES, _MASKS = ("images", "image", "img"), ("masks", "labels", "annotations", "mask", "annotation")


class MaskFolder(Dataset[Any]):
    """Images and their masks: ``images/`` and ``masks/`` with the same names, or both beside each other.

    Beside each other, a mask is the PNG of an image of another kind (``a.jpg`` and ``a.png``). A file ``classes.txt``
    there, or in the folder above, has the name of a class a line.

    Args:
        path: The folder.
        what: Name of the argument, for errors.

    Attributes:
        paths: Of the images.
        masks: Their masks.
        classes: Names of the classes, or ``None``.
        notes: What a person should know of it.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If there are no pairs, images without a mask, masks in JPEG, or two files of one name, or if
            ``classes.txt`` is not in UTF-8.
    """

    def __init__(self, path: Path, what: str) -> None:
        path = path.expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{what}={str(path)!r} is no folder.")
        images, masks = _separate(path) or _together(path, what)
        self.paths = [image for stem, image in sorted(images.items()) if stem in masks]
        self.masks = [masks[stem] for stem in sorted(images) if stem in masks]
        missing = [str(image) for stem, image in sorted(images.items()) if stem not in masks]
        if not self.paths:
            raise ValueError(
                f"{what}={str(path)!r} must hold images/ and masks/ with the same names, or images with PNG masks of "
                "the same names."
            )
        if missing:
            raise ValueError(f"{what} has {len(missing)} images without a mask: {', '.join(missing[:3])}.")
        lossy = [str(mask) for mask in self.masks if mask.suffix.lower() in _LOSSY]
        if lossy:
            raise ValueError(
                f"{what} has {len(lossy)} masks in JPEG, which changes class numbers and colours: "
                f"{', '.join(lossy[:3])}. Make them again, and save masks as PNG."
            )
        alone = [str(mask) for stem, mask in sorted(masks.items()) if stem not in images]
        self.notes = [f"{what}: {len(alone)} masks have no image: {', '.join(alone[:3])}"] if alone else []
        self.classes = _names(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return open_picture(self.paths[index]), open_picture(self.masks[index])


def _separate(path: Path) -> tuple[dict[str, Path], dict[str, Path]] | None:
    folders = {entry.name.lower(): entry for entry in subfolders(path)}
    images, masks = (next((folders[n] for n in names if n in folders), None) for names in (_IMAGES, _MASKS))
    if images is None or masks is None:
        return None
    return _by_stem(picture_files(images), images), _by_stem(picture_files(masks), masks)


def _by_stem(files: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Return files by their path in the folder without the suffix.

    Raises:
        ValueError: If two have the same.
    """
    found: dict[str, Path] = {}
    for file in files:
        stem = str(file.relative_to(folder).with_suffix(""))
        if stem in found:
            raise ValueError(f"{found[stem]} and {file} have one name, so that their masks cannot be told: rename one.")
        found[stem] = file
    return found


def _together(path: Path, what: str) -> tuple[dict[str, Path], dict[str, Path]]:
    files = [file for file in visible(path) if is_image(file)]
    images = _by_stem((file for file in files if file.suffix.lower() != ".png"), path)
    if not images and subfolders(path):
        raise ValueError(
            f"{what}={str(path)!r} holds folders, but neither images/ nor masks/: segmentation needs a mask an image."
        )
    return images, _by_stem((file for file in files if file.suffix.lower() == ".png"), path)


def names_in(file: Path) -> list[str]:
    """Return the names of classes in a text file, one a line; empty lines do not count.

    Raises:
        ValueError: If it is not in UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors begin it with a mark
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # so UTF-16 reads where all letters are ASCII
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8, the name of a class a line.")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _names(path: Path) -> list[str] | None:
    found = next((file for file in (path / "classes.txt", path.parent / "classes.txt") if file.is_file()), None)
    return None if found is None else names_in(found)
