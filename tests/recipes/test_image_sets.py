"""Data sets by name."""

import sys

import pytest
import torch
from PIL import Image


def test_image_data_of_a_folder_and_of_cifar100(tmp_path, data_folder):
    from hetkd.data import sets as image_data

    for split in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (50, 40), (100 * index, number, 0)).save(tmp_path / split / name / f"{number}.png")
    data = image_data.load_images(str(tmp_path), 24)
    assert data.train[0].shape == (6, 3, 24, 24)
    assert data.train[0][:, 0, 5, 5].tolist() == [0, 0, 0, 100, 100, 100]
    assert data.test[1].tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "gone")
    (tmp_path / "val" / "gone").rename(tmp_path / "elsewhere")
    again = image_data.load_images(str(tmp_path), 24)
    assert again.classes == 2
    assert again.test[1].tolist() == [1, 1, 1]
    assert data.first(4).train[1].tolist() == [0, 0, 1, 1]
    assert data.first(3).train[1].tolist() == [0, 0, 1]
    cifar = image_data.load_images("cifar100")
    assert cifar.train[0].shape == (50_000, 3, 32, 32)
    assert torch.equal(cifar.test[1].bincount(), torch.full((100,), 100))
    with pytest.raises(ValueError, match="no folder"):
        image_data.load_images("imagenot")


@pytest.mark.parametrize("name", ["vit", "resnet_slim", "test_resnet"])
def test_a_small_model_is_evaluated_on_a_folder_as_on_the_images_in_memory(tmp_path, name):
    from torchvision.transforms.functional import to_pil_image

    from hetkd import Distiller
    from hetkd.data import load_images
    from hetkd.models import build_small

    for split in ("train", "val"):
        for index in range(8):
            folder = tmp_path / split / "abcd"[index % 4]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 50 + index, 70)).save(folder / f"{index}.png")
    data = load_images(str(tmp_path), 32)
    model, size = build_small(name, 32, data.classes, data.channels)
    distiller = Distiller(None, model, "ce", input_size=size)
    assert distiller.evaluate(tmp_path / "val") == distiller.evaluate(data.test)


def test_hugging_face_dataset_by_its_columns(monkeypatch):
    import types

    from hetkd.data import sets as image_data

    class Image_:  # what datasets calls Image and ClassLabel
        pass

    Image_.__name__ = "Image"
    label = type("ClassLabel", (), {"names": ["aster", "rose", "tulip"]})()

    class Split(list):
        features = {"img": Image_(), "fine_label": label}

    samples = Split({"img": Image.new("L", (30, 20), 50 * index), "fine_label": index} for index in range(3))
    module = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": samples, "test": samples})
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = image_data.load_images("hf:someone/flowers", 16)
    assert data.classes == 3
    assert data.train[0][:, 1, 8, 8].tolist() == [0, 50, 100]
