"""Errors whose cure works, and inputs that are taken instead of refused; all before training."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_cnn
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.__main__ import parser
from hetkd.finetuning import finetune
from hetkd.student import Student
from hetkd.training import Callback, TrainingDiverged

CLASSES = 4


def pair(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = bright_or_dark(count)
    return images, labels % CLASSES


def fit(train=None, student=None, **options):
    distiller = Distiller(None, student or tiny_cnn(num_classes=CLASSES), "ce", input_size=32)
    return distiller.fit(train or pair(), **{"epochs": 1, "batch_size": 8, **QUIET, **options})


class Away(Callback):
    """Changes the working directory in the middle of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, moment):
        os.chdir(self.folder)


def test_a_relative_output_dir_is_one_folder_wherever_the_run_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    result = fit(output_dir="run", callbacks=[Away(tmp_path / "elsewhere")])
    assert result.output_dir == tmp_path / "run"
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("run", [fit, lambda **options: finetune(tiny_cnn(), pair(), epochs=1, **options, **QUIET)])
def test_an_empty_output_dir_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="output_dir='' names no folder: output_dir='runs/first'"):
        run(output_dir="")
    assert not list(tmp_path.iterdir())


def test_an_odd_batch_size_is_the_cause_where_images_are_mixed():
    with pytest.raises(ValueError, match="got batch_size=7: use batch_size=6"):
        fit(batch_size=7, mixup=0.2)
    fit(batch_size=6, mixup=0.2)
    with pytest.raises(ValueError, match="train has 5 images: use batch_size=4"):
        fit(pair(5), cutmix=1.0)
    fit(pair(5), cutmix=1.0, batch_size=4)
    with pytest.raises(ValueError, match=r"the last batch of train has 7 images, .*: use drop_last=True"):
        fit(DataLoader(TensorDataset(*pair(15)), batch_size=8), mixup=0.2)


def test_a_dict_of_tensors_is_no_dict_of_splits():
    images, labels = pair()
    with pytest.raises(TypeError, match=r"give a pair, \(data\['images'\], data\['labels'\]\)"):
        fit({"labels": labels, "images": images})
    with pytest.raises(TypeError, match=r"is a dict of the splits \['train'\]: give one of them"):
        fit({"train": [1]})


class OnePixel(nn.Module):
    """Pools and leaves the two axes of the map there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, CLASSES, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(self.body(x)).relu()


def test_logits_of_one_pixel_are_flattened():
    def distiller(teacher, **options):
        return Distiller(teacher, tiny_cnn(num_classes=CLASSES), "kd", input_size=32, **options)

    with pytest.raises(ValueError, match=r"say so: teacher_classes=\.\.\."):
        distiller(OnePixel())
    with pytest.raises(ValueError, match=r"yields maps \[B, 4, 1, 1\]: flatten them, .*nn.Flatten\(1\)"):
        distiller(OnePixel(), teacher_classes=CLASSES)
    flat = nn.Sequential(OnePixel(), nn.Flatten(1))
    assert distiller(flat, teacher_classes=CLASSES)(*pair()).terms["kd"].isfinite()


class Masked(nn.Module):
    """Leaves a class out by -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_cnn(num_classes=CLASSES)

    def forward(self, x):
        return self.model(x) + torch.tensor([0.0, 0.0, 0.0, -float("inf")])


def test_a_teacher_that_is_not_finite_is_named():
    def train(teacher):
        distiller = Distiller(teacher, tiny_cnn(num_classes=CLASSES), "kd", input_size=32, teacher_classes=CLASSES)
        distiller.fit(pair(), epochs=1, batch_size=8, **QUIET)

    broken = tiny_cnn(num_classes=CLASSES)
    nn.init.constant_(broken.fc.weight, float("nan"))
    with pytest.raises(ValueError, match="the teacher's logits are NaN: look at its weights"):
        train(broken)
    with pytest.raises(TrainingDiverged, match="step 1: the teacher's own logits are NaN or Inf"):
        train(Masked())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": [0, 0, 0, 0]}, "class_weights has only zeros"),
        ({"class_weights": [1, -1, 1, 1]}, "class_weights has -1 for class 1: give numbers of at least 0"),
        ({"class_weights": [1, 1, float("nan"), 1]}, "class_weights has nan for class 2"),
        ({"optimizer_options": {"momentum": 0.5}}, r"an option of fit itself: fit\(\.\.\., momentum=0.5\)"),
        ({"optimizer_options": {"opt": "sgd"}}, r"fit\(\.\.\., optimizer='sgd'\)"),
        ({"optimizer": torch.optim.RAdam, "lr": 1e-3, "optimizer_options": {"lr": 1}}, r"fit\(\.\.\., lr=1\)"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4,000,000,000"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    ],
)
def test_options_are_read_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_the_momentum_of_an_optimizer_class_is_its_own_option():
    fit(optimizer=torch.optim.SGD, lr=0.01, optimizer_options={"momentum": 0.5})


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "uint8", "float64"])
def test_arrays_are_taken_as_tensors_are(layout):
    images, labels = pair()
    arrays = {
        "NCHW": images.numpy(),
        "NHWC": images.permute(0, 2, 3, 1).numpy(),
        "uint8": (images * 255).byte().permute(0, 2, 3, 1).numpy(),
        "float64": images.double().numpy(),
    }
    distiller = Distiller(None, tiny_cnn(num_classes=CLASSES), "ce", input_size=32)
    expected = distiller.evaluate((images, labels))["loss"]
    found = distiller.evaluate((arrays[layout], labels.numpy().astype(np.int32)))["loss"]
    assert found == pytest.approx(expected, abs=2e-2 if layout == "uint8" else 1e-5)
    with pytest.raises(TypeError, match="val has an array of dtype <U3: give numbers"):
        distiller.evaluate((arrays[layout], np.array(["cat"] * 16)))


def grey(pixels: int = 32) -> Image.Image:
    return Image.new("RGB", (pixels, pixels), (99, 99, 99))


@pytest.mark.parametrize("strange", [(None, 1), None])
def test_none_is_an_unreadable_image(strange):
    data = [(grey(), 0), (grey(), 1), strange, (grey(), 1)] * 2
    with pytest.raises(OSError, match=r"image 2 cannot be read \(the dataset yields None\): repair or remove it"):
        fit(data, batch_size=len(data))
    assert fit(data, batch_size=4, unreadable="skip").history[0]["unreadable_images"] == 2


@pytest.mark.parametrize(("image", "kind"), [("photo.jpg", "str"), ([[0, 1], [1, 0]], "list")])
def test_what_is_no_image_is_named(image, kind):
    with pytest.raises(TypeError, match=f"image 2 is of type {kind}: the dataset must yield PIL images"):
        fit([(grey(), 0), (grey(), 1), (image, 1), (grey(), 0)], batch_size=4)


def test_a_sample_unlike_the_others_is_named():
    tensor = torch.rand(3, 32, 32)
    with pytest.raises(ValueError, match=r"image 3 has no label, but image \d has one"):
        fit([(tensor, 0), (tensor, 1), (tensor, 0), (tensor, None)], batch_size=4)
    with pytest.raises(ValueError, match=r"image \d has the shape .*, and image \d .*resize them in the dataset"):
        fit([(tensor, 0), (tensor, 1), (tensor, 0), (torch.rand(3, 32, 40), 1)], batch_size=4)


def test_fit_has_gradients_of_its_own():
    with torch.no_grad():
        assert fit().history[0]["train/ce"] > 0
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call fit outside of it"):
        fit()


@pytest.mark.parametrize("images", [b"\xff\xd8", (x for x in [torch.rand(3, 32, 32)]), [b"\xff\xd8"], 3])
def test_a_student_says_what_it_takes(images):
    with pytest.raises(TypeError, match=r"a picture must be a path, a PIL image, .* several come in a list"):
        Student(tiny_cnn()).predict(images)


def test_paths_in_the_shell_are_no_numbers():
    words = ["distil", "timm:a", "timm:b", "photos", "--output-dir", "2024_01", "--teacher-cache", "7", "--epochs", "3"]
    found = vars(parser(words).parse_args(words))
    assert (found["output_dir"], found["teacher_cache"], found["epochs"]) == ("2024_01", "7", 3)
    words = ["export", "a.safetensors", "b.onnx", "--images", "2024", "--most-images", "9"]
    found = vars(parser(words).parse_args(words))
    assert (found["images"], found["most_images"]) == ("2024", 9)
    words = ["distil", "timm:a", "timm:b", "photos", "--output-dir", "None"]
    assert vars(parser(words).parse_args(words))["output_dir"] is None
