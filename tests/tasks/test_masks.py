"""Images with masks: folders, palettes, colours, joint crops, errors with paths."""

import numpy as np
import pytest
import torch
from PIL import Image

from hetkd import Segmentation
from hetkd.data.mask_folders import MaskFolder
from hetkd.data.masks import TrainingCrop, make_mask_dataset, read_mask
from hetkd.data.pictures import UnreadableImage
from hetkd.data.samples import images_and_labels
from hetkd.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec

SPEC = InputSpec(3, (32, 32), IMAGENET_MEAN, IMAGENET_STD)


def write(folder, name, size=(40, 30), mask_size=None, value=1):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(folder / f"{name}.jpg")
    Image.new("L", mask_size or size, value).save(folder / f"{name}.png")


def dataset(folder, *, train=False, **options):
    return make_mask_dataset(str(folder), what="train", spec=SPEC, size=(32, 32), train=train, **options)


def test_pairs_beside_each_other(tmp_path):
    write(tmp_path, "b")
    write(tmp_path, "a", value=2)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    folder = MaskFolder(tmp_path, "train")
    assert [path.name for path in folder.paths] == ["a.jpg", "b.jpg"]
    assert folder.classes == ["sky", "road", "car"]
    image, mask = dataset(tmp_path)[0]
    assert image.shape == (3, 32, 32)
    assert mask.shape == (30, 40)  # of evaluation: the size that it has
    assert mask.unique().tolist() == [2]


def test_pairs_in_two_folders(tmp_path):
    for name in ("x", "sub/y"):
        write(tmp_path / "all" / name.rpartition("/")[0], name.rpartition("/")[2])
    for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
        for file in (tmp_path / "all").rglob(f"*{suffix}"):
            to = tmp_path / kind / file.relative_to(tmp_path / "all")
            to.parent.mkdir(parents=True, exist_ok=True)
            file.rename(to)
    assert len(MaskFolder(tmp_path, "train")) == 2


def test_image_and_mask_are_cropped_alike():
    mask = torch.randint(0, 200, (40, 60), generator=torch.Generator().manual_seed(0))
    image = mask.to(torch.uint8).expand(3, 40, 60)
    crop = TrainingCrop(InputSpec(3, (40, 60), (0,) * 3, (1,) * 3, "nearest"), (40, 60), 0.3)
    crop._transform.transforms.pop()  # colour, which changes images alone
    for seed in range(5):
        torch.manual_seed(seed)
        pixels, classes = crop(image, mask)
        assert torch.equal(pixels[0].long(), classes)


def test_training_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    for name in "abc":
        write(tmp_path, name)
    first, second = (dataset(tmp_path, train=True, seed=3) for _ in range(2))
    assert torch.equal(first[1][0], second[1][0])
    second.start_epoch(1)
    assert first[1][0].shape == second[1][0].shape == (3, 32, 32)


def test_kinds_of_masks():
    palette = Image.new("P", (4, 3), 7)
    palette.putpalette([0] * 768)
    assert read_mask(palette, None, 255).unique().tolist() == [7]
    assert read_mask(np.full((3, 4), 300, np.uint16), None, 255).unique().tolist() == [300]
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0, 0] = (128, 0, 0)
    colours[1, 1] = (1, 2, 3)
    found = read_mask(Image.fromarray(colours), [(0, 0, 0), (128, 0, 0)], 255)
    assert found.tolist() == [[1, 0], [0, 255]]


BAD = {
    "size": ({"mask_size": (20, 20)}, "the mask of .*a.jpg has 20 x 20 pixels, its image 40 x 30"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs(name, tmp_path):
    options, message = BAD[name]
    write(tmp_path, "a", **options)
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path)[0]


def test_masks_in_colour_need_a_table(tmp_path):
    write(tmp_path, "a")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"the mask of .*a.jpg is in colour: .*Segmentation\(colors="):
        dataset(tmp_path)[0]


def test_folders_without_pairs(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="neither images/ nor masks/"):
        MaskFolder(tmp_path, "train")
    write(tmp_path / "some", "a")
    Image.new("RGB", (4, 4)).save(tmp_path / "some" / "b.jpg")
    with pytest.raises(ValueError, match=r"1 images without a mask: .*b.jpg"):
        MaskFolder(tmp_path / "some", "train")
    with pytest.raises(FileNotFoundError):
        MaskFolder(tmp_path / "none", "train")
    with pytest.raises(ValueError, match=r"needs masks \[N, H, W\]"):
        make_mask_dataset((torch.rand(2, 3, 8, 8), torch.zeros(2)), what="train", spec=SPEC, size=(8, 8), train=True)


def test_two_images_of_one_name_are_refused(tmp_path):
    for folder, suffix in (("images", "jpg"), ("images", "png"), ("masks", "png")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / f"a.{suffix}")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png have one name"):
        MaskFolder(tmp_path, "train")


def test_labels_that_count_from_one_are_reduced():
    mask = np.array([[0, 1, 150], [255, 2, 0]], np.uint8)
    assert read_mask(mask, None, 255, reduce_labels=True).tolist() == [[255, 0, 149], [255, 1, 255]]
    data = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduce_labels=True is for folders and datasets, but train is TensorImages"):
        Segmentation(reduce_labels=True).make_dataset(data, what="train", spec=SPEC, size=(8, 8), train=True)
    with pytest.raises(ValueError, match="has no use beside colors"):
        Segmentation(reduce_labels=True, colors=[(0, 0, 0)])


def test_unreadable_images_are_skipped_where_masks_are_looked_at(tmp_path):
    for name in "abc":
        write(tmp_path, name)
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    assert len(dataset(tmp_path, skip_unreadable=True).some_masks(3)) == 2
    with pytest.raises(UnreadableImage):
        dataset(tmp_path).some_masks(3)


def test_masks_beside_labels_are_left_alone():
    picture = Image.new("RGB", (4, 4))
    assert images_and_labels({"image": picture, "mask": picture}) == (picture, None)
    assert images_and_labels({"image": picture, "species": 3, "mask": torch.zeros(4, 4)})[1] == 3


def test_a_mask_of_zeros_is_no_class_to_be_reduced_to():
    with pytest.raises(ValueError, match="ignore_index=0 may be a class: with reduce_labels=True"):
        Segmentation(ignore_index=0, reduce_labels=True)


def test_loaders_of_dicts_with_masks():
    images, masks = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    for key in ("mask", "labels", "annotation"):
        found = images_and_labels({"image": images, key: masks})
        assert found[0] is images
        assert found[1] is masks


def test_dicts_of_hugging_face():
    rows = [{"image": Image.new("RGB", (8, 8)), "annotation": Image.new("L", (8, 8), 4)}]
    found = make_mask_dataset(rows, what="train", spec=SPEC, size=(32, 32), train=False)
    assert found[0][1].unique().tolist() == [4]
    with pytest.raises(TypeError, match="label_key"):
        make_mask_dataset([{"image": rows[0]["image"]}], what="train", spec=SPEC, size=(32, 32), train=False)[0]


def test_images_that_exif_turns_are_refused(tmp_path):
    write(tmp_path, "a", size=(30, 30))
    image = Image.open(tmp_path / "a.jpg")
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"a.jpg is turned by its EXIF data \(orientation 3\)"):
        dataset(tmp_path)[0]


def test_a_quarter_turn_is_told_by_the_size_of_the_mask(tmp_path):
    write(tmp_path, "a", size=(40, 30), mask_size=(30, 40))
    image = Image.open(tmp_path / "a.jpg")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert dataset(tmp_path)[0][1].shape == (40, 30)
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"the mask of .*a.jpg has 40 x 30 pixels, its image 30 x 40"):
        dataset(tmp_path)[0]
