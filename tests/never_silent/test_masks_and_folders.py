"""Masks and folders that would train on nothing, or on wrong classes: each is read right, or an error or a note."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.segmenters import small

from hetkd import Distiller, Segmentation
from hetkd.data.folders import ClassFolders, open_folder, picture_files
from hetkd.data.mask_folders import MaskFolder, names_in
from hetkd.data.masks import read_mask
from hetkd.data.pictures import open_picture
from hetkd.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec

SPEC = InputSpec(3, (8, 8), IMAGENET_MEAN, IMAGENET_STD)
TABLE = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]


def masked(masks, **options):
    """The training data of a task whose images have these masks, and the task."""
    task = Segmentation(**options)
    rows = [(Image.new("RGB", (4, 4)), mask) for mask in masks]
    return task, task.make_dataset(rows, what="train", spec=SPEC, size=(8, 8), train=True)


def looked_at(masks, **options):
    task, dataset = masked(masks, **options)
    return task.remarks(dataset)


def colored(*colors) -> Image.Image:
    """A mask of 4 x 4 pixels in these colours, in equal parts."""
    pixels = np.repeat(np.array(colors, np.uint8), 16 // len(colors), 0)
    return Image.fromarray(pixels.reshape(4, 4, 3))


def palette(index: int, color) -> Image.Image:
    mask = Image.new("P", (4, 4), index)
    mask.putpalette([0, 0, 0] * index + list(color))
    return mask


def pictures(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / file)
    return root


# Masks in colour


@pytest.mark.parametrize(
    ("mask", "colors", "value"),
    [
        (palette(1, TABLE[2]), TABLE, 2),
        (palette(1, TABLE[2]), None, 1),
        (colored(TABLE[1]).convert("RGBA"), TABLE, 1),
        (Image.new("L", (4, 4), 255), [(0, 0, 0), (255, 255, 255)], 1),
        (Image.new("I;16", (4, 4), 2), TABLE, 2),
    ],
    ids=["palette and table", "palette alone", "RGBA", "grey and table", "16 bits"],
)
def test_masks_are_read_by_the_table_where_there_is_one(mask, colors, value):
    assert read_mask(mask, colors, 255).unique().tolist() == [value]


def test_colours_without_a_class_are_said_with_an_image():
    notes = looked_at([colored(*TABLE[:2]), colored(TABLE[0], (1, 2, 3))], colors=TABLE)
    assert notes == [
        "colours of masks that are none of colors= and count nowhere (1): (1, 2, 3) (50 % of the mask of image 1)"
    ]
    assert looked_at([colored(*TABLE[:2])], colors=TABLE) == []


NOTHING = {
    "another table": (
        [colored((0, 0, 200))],
        {"colors": TABLE[1:]},
        r"\(0, 0, 200\) \(100 % of the mask of image 0",
    ),
    "ignored": ([Image.new("L", (4, 4), 255)], {}, "all their pixels are ignore_index=255"),
    "reduced": ([Image.new("L", (4, 4), 0)], {"reduce_labels": True}, "leave reduce_labels=True out"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_masks_without_any_class_are_refused(name):
    masks, options, message = NOTHING[name]
    with pytest.raises(ValueError, match=f"no mask that was looked at holds a class: .*{message}"):
        looked_at(masks, **options)


def test_one_mask_with_a_class_is_enough():
    few = [Image.new("L", (4, 4), 255) for _ in range(40)]
    few[1] = Image.new("L", (4, 4), 1)  # not among the sixteen
    assert looked_at(few) == []


def test_tensors_without_any_class_are_refused_by_fit():
    data = torch.rand(4, 3, 32, 32), torch.full((4, 32, 32), 255)
    with pytest.raises(ValueError, match="no mask that was looked at holds a class"):
        Distiller(None, small(), "ce", input_size=32).fit(data, epochs=1, progress=False, cpu=True)


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="three numbers for each class"):
        Segmentation(colors=[])


# Masks of other kinds


def jpeg(path: Path) -> Image.Image:
    Image.new("L", (4, 4), 1).save(path, "JPEG")
    return open_picture(path)


UNFIT = {
    "LA": (Image.new("LA", (4, 4)), {}, r"has shape \[4, 4, 2\]: it must be whole numbers"),
    "F": (Image.new("F", (4, 4)), {}, "has pixels of torch.float32: it must be whole numbers"),
    "float colours": (np.zeros((4, 4, 3), np.float32), {"colors": TABLE}, "has pixels of torch.float32"),
    "colour": (colored(TABLE[1]), {}, r"is in colour: .*Segmentation\(colors="),
    "channel": (np.zeros((4, 4, 1), np.uint8), {}, r"has shape \[4, 4, 1\]"),
    "path": ("a.png", {}, "is of type str"),
    "nothing": (None, {}, "is of type NoneType"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_errors_name_the_image_of_a_mask(name):
    mask, options, message = UNFIT[name]
    task, dataset = masked([Image.new("L", (4, 4)), mask], **options)
    with pytest.raises(ValueError, match=f"the mask of image 1 {message}"):
        task.remarks(dataset)
    with pytest.raises(ValueError, match=f"the mask of image 1 {message}"):
        dataset[1]


def test_masks_in_jpeg_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the mask of image 0 is a JPEG.*save masks as PNG"):
        looked_at([jpeg(tmp_path / "a.png")])
    pictures(tmp_path, "images/a.png", "images/b.png", "masks/a.png", "masks/b.jpg")
    with pytest.raises(ValueError, match=r"train has 1 masks in JPEG.*b\.jpg\. .*save masks as PNG"):
        MaskFolder(tmp_path, "train")


def test_litter_beside_masks_does_not_count(tmp_path):
    pictures(tmp_path / "beside", "a.jpg", "a.png", "._a.png", ".b.jpg", "@eaDir/c.jpg")
    pictures(tmp_path / "apart", "images/a.jpg", "images/sub/@eaDir/c.jpg", "masks/a.png", "masks/.x/a.png")
    for kind in ("beside", "apart"):
        assert [path.name for path in MaskFolder(tmp_path / kind, "train").paths] == ["a.jpg"]
        assert MaskFolder(tmp_path / kind, "train").notes == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_of_classes_may_begin_with_a_mark(tmp_path, encoding):
    (tmp_path / "classes.txt").write_text("Straße\ncar\n", encoding=encoding)
    assert names_in(tmp_path / "classes.txt") == ["Straße", "car"]


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "Straße"), ("utf-16", "road"), ("utf-16-le", "road")])
def test_names_of_classes_in_other_encodings_are_refused(tmp_path, encoding, name):
    (tmp_path / "classes.txt").write_bytes(name.encode(encoding))
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text: save it as UTF-8"):
        names_in(tmp_path / "classes.txt")


# Class folders

SPLITS = {
    "sets": (["training_set/a/0.png", "test_set/a/0.png"], "training_set', .*test_set"),
    "dev": (["train/0.png", "dev/0.png"], "train', .*dev"),
    "years": (["train2017/a/0.png", "val2017/a/0.png"], "train2017', .*val2017"),
    "capitals": (["TRAIN/a/0.png", "eval/b/0.png"], "TRAIN', .*eval"),
    "extra": (["train/0.png", "val/0.png", "extra/0.png"], "train', .*val"),
    "three": (["test/0.png", "train/0.png", "val/0.png"], "train', .*val"),
    "folds": (["fold1/a/0.png", "fold1/b/0.png", "fold2/a/0.png"], "fold1', .*fold2"),
    "labeled": (["labeled/a/0.png", "unlabeled/a/0.png", "more/0.png"], "labeled', .*unlabeled"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_no_classes(tmp_path, name):
    files, call = SPLITS[name]
    with pytest.raises(ValueError, match=rf"instead of classes: call fit\('.*{call}.*[Ii]f they are classes"):
        open_folder(pictures(tmp_path, *files), "train")


CLASSES = {
    "a train": ["train/0.png", "car/0.png", "bus/0.png"],
    "subfolders of other names": ["cat/red/0.png", "cat/blue/0.png", "dog/old/0.png"],
    "images beside subfolders": ["cat/0.png", "cat/day/0.png", "dog/0.png", "dog/day/0.png"],
    "a rest in each": ["cat/red/0.png", "cat/blue/0.png", "cat/x/0.png", "dog/a/0.png", "dog/b/0.png", "dog/x/0.png"],
    "Tiny ImageNet's layout": ["n00/images/0.png", "n01/images/0.png"],
    "two views of each": ["a/front/0.png", "a/back/0.png", "b/front/0.png", "b/back/0.png"],
    "a few nested alike": ["a/day/0.png", "b/day/0.png", "c/0.png", "d/0.png", "e/0.png"],
    "valid and not": ["valid/0.png", "invalid/0.png"],
}


@pytest.mark.parametrize("name", CLASSES)
def test_nested_class_folders_are_classes(tmp_path, name):
    folders = open_folder(pictures(tmp_path, *CLASSES[name]), "train")
    assert isinstance(folders, ClassFolders)
    assert folders.classes == sorted({file.partition("/")[0] for file in CLASSES[name]})
    assert len(folders) == len(CLASSES[name])
    assert all("hold subfolders of the same names" in note for note in folders.notes)


@pytest.mark.parametrize("litter", ["@eaDir", "__MACOSX", "$RECYCLE.BIN", ".trash"])
def test_litter_counts_at_no_depth(tmp_path, litter):
    pictures(tmp_path, "a/0.png", f"a/{litter}/1.png", f"a/sub/{litter}/deep/2.png", "a/sub/3.png", "b/4.png")
    assert [Path(path).name for path, _ in open_folder(tmp_path, "train").samples] == ["0.png", "3.png", "4.png"]
    assert [path.name for path in picture_files(tmp_path / "a")] == ["0.png", "3.png"]


def test_images_beside_class_folders_are_said(tmp_path):
    pictures(tmp_path, "a/0.png", "b/0.png", "lost.png", "stray.png", ".hidden.png")
    said = "train: 2 images beside the class folders are left out: lost.png, stray.png"
    assert open_folder(tmp_path, "train").notes == [said]


def test_links_that_lead_back_are_not_followed(tmp_path):
    data, away = pictures(tmp_path / "data", "a/0.png", "b/1.png"), pictures(tmp_path / "away", "2.png", "in/3.png")
    links = {"a/up": data, "a/self": data / "a", "loop": data, "b/more": away, "b/top": tmp_path}
    for link, target in links.items():
        (data / link).symlink_to(target)
    (away / "in" / "back").symlink_to(away)
    folders = open_folder(data, "train")
    assert folders.classes == ["a", "b"]
    assert [Path(path).name for path, _ in folders.samples] == ["0.png", "1.png", "2.png", "3.png"]
    linked = tmp_path / "linked"
    linked.symlink_to(data)
    assert len(open_folder(linked, "train")) == 4
