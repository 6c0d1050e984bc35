"""Classes and labels that would train a wrong student: each gives the right value, or an error before training."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from safetensors import safe_open
from torch import nn
from training_runs import QUIET
from transformers import ViTConfig, ViTForImageClassification
from transformers_models import HUGGING_FACE

from hetkd import Distiller
from hetkd.data.folders import ClassFolders, open_folder
from hetkd.data.images import TransformedImages
from hetkd.data.samples import Keys, images_and_labels

LEVELS = {"a": 20, "b": 90, "c": 160, "d": 230}


def grey_folders(root: Path, names, count: int = 4) -> Path:
    """Class folders of images of one brightness a class."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            level = LEVELS.get(name, 128) + index
            Image.new("RGB", (32, 32), (level, level, level)).save(root / name / f"{index}.png")
    return root


class ByBrightness(nn.Module):
    """Knows the four brightnesses, in an order of its own."""

    def __init__(self, order: str = "abcd") -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 4)
        self.register_buffer("levels", torch.tensor([LEVELS[name] / 255 for name in order]))

    def forward(self, x):
        level = self.body(x).mean((1, 2, 3)) * 0 + (x * 0.226 + 0.449).mean((1, 2, 3))
        return self.head(torch.zeros(len(x), 4)) * 0 - 100 * (level[:, None] - self.levels).abs()


def alone(model) -> Distiller:
    return Distiller(None, model, "ce", input_size=32)


def test_validation_folders_are_those_of_the_training_by_name(tmp_path):
    train, val = grey_folders(tmp_path / "train", "abcd"), grey_folders(tmp_path / "val", "acd")
    distiller = Distiller(None, tiny_cnn(num_classes=4), "ce", input_size=32)
    distiller.fit(train, val, epochs=1, batch_size=8, **QUIET)
    assert distiller.class_names == list("abcd")
    knowing = alone(ByBrightness())
    knowing.class_names = distiller.class_names
    assert knowing.evaluate(val)["top1"] == 100


def test_a_validation_folder_that_training_lacks_is_an_error_that_lists_both(tmp_path):
    train, val = grey_folders(tmp_path / "train", "abc"), grey_folders(tmp_path / "val", ["a", "d"])
    with pytest.raises(ValueError, match="val has classes that train lacks: d; train has a, b, c"):
        alone(tiny_cnn(num_classes=4)).fit(train, val, epochs=1, batch_size=4, **QUIET)


def test_missing_validation_classes_are_said(tmp_path, capsys):
    train, val = grey_folders(tmp_path / "train", "abcd"), grey_folders(tmp_path / "val", "acd")
    alone(tiny_cnn(num_classes=4)).fit(train, val, epochs=1, batch_size=8, cpu=True)
    assert "val has no images of 1 classes: b" in capsys.readouterr().out


@pytest.mark.parametrize("litter", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cache"])
def test_litter_is_no_class(tmp_path, litter):
    grey_folders(tmp_path, ["a", "b", litter])
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    folders = open_folder(tmp_path, "train")
    assert isinstance(folders, ClassFolders)
    assert folders.classes == ["a", "b"]
    assert {label for _, label in folders.samples} == {0, 1}
    assert folders.notes == []


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("Training", "Validation"), ("train",)])
def test_a_folder_of_splits_is_refused_with_the_call_that_was_meant(tmp_path, splits):
    for split in splits:
        grey_folders(tmp_path / split, "ab")
    with pytest.raises(ValueError, match=f"instead of classes: call fit.*{splits[0]}"):
        alone(tiny_cnn()).fit(tmp_path, epochs=1, **QUIET)


def test_whole_numbers_that_sort_as_text_and_files_that_are_left_out_are_said(tmp_path, capsys):
    grey_folders(tmp_path, ["0", "1", "2", "10"])
    Image.new("RGB", (8, 8)).save(tmp_path / "0" / "x.gif")
    (tmp_path / "1" / "y.jfif").write_bytes(b"x")
    alone(tiny_cnn(num_classes=4)).fit(tmp_path, epochs=2, batch_size=8, cpu=True)
    out = capsys.readouterr().out
    assert out.count("class folders sort as text: label 2 is folder '10'") == 1
    assert out.count("files with .gif (1), .jfif (1) are left out") == 1


def test_an_empty_class_folder_is_named(tmp_path):
    grey_folders(tmp_path, "ab")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="class folders without images: c"):
        alone(tiny_cnn()).fit(tmp_path, epochs=1, **QUIET)


def test_a_single_class_is_refused_unless_labels_do_not_count(tmp_path):
    folder = grey_folders(tmp_path, "a", 8)
    with pytest.raises(ValueError, match="single class 'a'"):
        alone(tiny_cnn()).fit(folder, epochs=1, **QUIET)
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", ce_weight=0, input_size=32)
    assert distiller.fit(folder, epochs=1, batch_size=4, **QUIET).history[0]["train/kd"] > 0


def with_names(order: str) -> nn.Module:
    config = ViTConfig(**HUGGING_FACE[0][1], num_labels=4)
    config.architectures, config.id2label = [], dict(enumerate(order))
    return ViTForImageClassification(config).eval()


def test_labels_follow_a_teacher_that_has_the_same_classes_in_another_order(tmp_path, capsys):
    folder = grey_folders(tmp_path / "train", "abcd")
    distiller = Distiller(with_names("dcba"), tiny_cnn(num_classes=4), "kd", input_size={"student": 32})
    distiller.fit(folder, folder, epochs=1, batch_size=8, cpu=True, output_dir=tmp_path / "run")
    out = capsys.readouterr().out
    assert "labels of train follow the teacher's classes by name: 'a' is 3" in out
    assert "the teacher is right on" in out
    assert distiller.class_names == list("dcba")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["classes"] == list("dcba")
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list("dcba")
    knowing = alone(ByBrightness("dcba"))
    knowing.class_names = distiller.class_names
    assert knowing.evaluate(folder)["top1"] == 100


def test_a_teacher_of_other_classes_is_refused_under_a_loss_on_logits(tmp_path):
    folder = grey_folders(tmp_path / "train", "abcd")
    distiller = Distiller(
        with_names(["cat", "dog", "fox", "owl"]), tiny_cnn(num_classes=4), "kd", input_size={"student": 32}
    )
    with pytest.raises(ValueError, match=r"classes that the teacher does not know \(a, b, c, d\), which knows cat"):
        distiller.fit(folder, epochs=1, **QUIET)


def test_folders_of_wordnet_ids_follow_an_imagenet_teacher(tmp_path):
    folder = grey_folders(tmp_path / "train", ["n01443537", "n02102040", "n03000684"])
    teacher = timm.create_model("test_vit", num_classes=1000)
    distiller = Distiller(teacher, timm.create_model("test_resnet", num_classes=1000), "kd")
    distiller.fit(folder, epochs=1, batch_size=4, **QUIET)
    assert [distiller.class_names.index(name) for name in ("n01443537", "n02102040", "n03000684")] == [1, 217, 491]


def test_a_teacher_at_chance_is_a_warning(tmp_path):
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
    with pytest.warns(RuntimeWarning, match="which is chance for 10 classes"):
        Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32).fit((images, labels), epochs=1, **QUIET)


@pytest.mark.parametrize("labels", [torch.rand(8, 1), None])
def test_a_student_with_one_logit_is_refused(labels):
    with pytest.raises(ValueError, match="one logit, whose softmax is always 1"):
        Distiller(tiny_vit(num_classes=1), tiny_cnn(num_classes=1), "kd", input_size=32)


def test_several_classes_at_once_are_refused():
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32)
    with pytest.raises(ValueError, match="do not sum to 1"):
        distiller(torch.rand(4, 3, 32, 32), torch.ones(4, 10))


def test_a_multi_label_teacher_is_refused_where_its_logits_count():
    teacher = with_names("abcd")
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="multi-label"):
        Distiller(teacher, tiny_cnn(num_classes=4), "kd", input_size={"student": 32})
    Distiller(teacher, tiny_cnn(num_classes=4), "rsd", input_size={"student": 32})


@pytest.mark.parametrize("key", ["class", "target", "fine_label", "species"])
def test_label_columns_are_found_by_name_or_type(key):
    assert images_and_labels({"picture": Image.new("RGB", (4, 4)), key: 3, "name": "x"})[1] == 3


def test_of_several_columns_that_fit_one_is_named():
    sample = {"image": Image.new("RGB", (4, 4)), "kind": 3, "site": 7}
    with pytest.raises(TypeError, match="its label in kind or site: name it, label_key='kind'"):
        images_and_labels(sample)
    assert images_and_labels(sample, Keys(label="site"))[1] == 7


class Rows:
    """A dataset of the rows given."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_keys_are_options_of_fit_and_evaluate():
    rows = Rows([{"scan": Image.new("RGB", (32, 32)), "kind": n % 4, "site": 9} for n in range(8)])
    distiller = alone(tiny_cnn(num_classes=4))
    keys = {"image_key": "scan", "label_key": "kind"}
    distiller.fit(rows, epochs=1, batch_size=4, **keys, **QUIET)
    assert distiller.evaluate(rows, **keys)["top1"] in (0.0, 25.0, 50.0, 75.0, 100.0)


def test_text_as_a_label_and_a_dict_of_splits_are_refused():
    with pytest.raises(TypeError, match="the label of image 0 is the text 'cat'"):
        TransformedImages(Rows([(Image.new("RGB", (4, 4)), "cat")]), lambda image: image)[0]
    with pytest.raises(TypeError, match=r"a dict of the splits \['train', 'test'\]"):
        alone(tiny_cnn()).fit({"train": [], "test": []}, epochs=1, **QUIET)


def test_numpy_images_with_channels_last():
    rows = Rows([(np.full((32, 32, 3), 60 * n, np.uint8), n) for n in range(4)])
    result = alone(tiny_cnn(num_classes=4)).fit(rows, epochs=1, batch_size=4, **QUIET)
    assert result.history[0]["train/ce"] > 0
