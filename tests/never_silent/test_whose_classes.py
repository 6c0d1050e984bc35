"""Classes by name, wherever names come from: the right value, or an error before training."""

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_cnn
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from training_runs import QUIET

from hetkd import Distiller
from hetkd.data.classes import class_names, match
from hetkd.training.callbacks import Callback

NAMES = ["ant", "bee", "cat", "dog"]
SHADES = dict(zip(NAMES, (0, 85, 170, 255), strict=True))
ONCE = {"epochs": 1, "batch_size": 8, "lr": 1e-9, **QUIET}
IMAGES, LABELS = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


class Knows(nn.Module):
    """Tells four classes by their shade, always rightly; with an order of its own it knows their names."""

    def __init__(self, order: list[str] | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        shades = torch.tensor([SHADES[name] for name in order or NAMES]) / 255
        self.head.weight.data = 40 * shades[:, None].repeat(1, 3)
        self.head.bias.data = -60 * shades.square()
        self.input_settings = {"size": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        if order:
            self.input_settings["categories"] = order

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def folders(root: Path, names=NAMES, shades=None) -> Path:
    for name, shade in zip(names, shades or [SHADES[name] for name in names], strict=True):
        (root / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32), (shade,) * 3).save(root / name / f"{index}.png")
    return root


def tensors(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def alone(model: nn.Module | None = None) -> Distiller:
    return Distiller(None, model or Knows(), "ce", input_size=32)


def top1(train, val, teacher: list[str] | None = None, **options) -> float:
    model = Knows(teacher)
    distiller = alone(model) if teacher is None else Distiller(Knows(teacher), model, "kd", input_size=32)
    return distiller.fit(train, val, **ONCE, **options).history[-1]["top1"]


@pytest.mark.parametrize("names", [["A", "B", "a", "b"], ["-1", "0", "1", "2"], ["a b", "a-b", "a_b", "ab"]])
def test_names_that_differ_a_little_are_different_classes(tmp_path, names):
    data = folders(tmp_path / "x", names, list(SHADES.values()))
    assert top1(data, data) == 100


def test_one_name_is_matched_loosely_where_it_is_the_only_one():
    assert match(["Sea Lion", "cafe\u0301"], [("caf\u00e9",), ("sea_lion",)]) == [1, 0]
    assert match(["a-b", "A_b"], [("a b",)]) == [None, None]


def test_validation_follows_names_through_sums_and_loaders(tmp_path):
    whole, part = folders(tmp_path / "x"), folders(tmp_path / "y", ["ant", "cat", "dog"])
    assert top1(whole, ConcatDataset([ImageFolder(part)])) == 100
    assert top1(ConcatDataset([ImageFolder(whole)]), part) == 100
    assert top1(whole, DataLoader(ImageFolder(whole, tensors), 8)) == 100
    with pytest.raises(ValueError, match=r"val is a loader.*'cat' is 1 there, but 2 of the student.*loader.dataset"):
        top1(whole, DataLoader(ImageFolder(part, tensors), 8))


def test_what_cannot_follow_the_teachers_order_is_refused(tmp_path):
    data, other = folders(tmp_path / "x"), NAMES[::-1]
    loader = DataLoader(ImageFolder(data, tensors), 8)
    assert top1(data, data, other) == 100
    with pytest.raises(ValueError, match=r"val is a loader.*'ant' is 0 there, but 3 of the student"):
        top1(data, loader, other)
    with pytest.raises(ValueError, match=r"train is a loader.*'ant' is 0 there, but 3 of the teacher"):
        top1(loader, data, other)
    with pytest.raises(ValueError, match=r"val has labels without names"):
        top1(data, (torch.rand(8, 3, 32, 32), torch.arange(8) % 4), other)
    two = Distiller([Knows(other), Knows(NAMES)], tiny_cnn(num_classes=4), "kd", input_size=32)
    with pytest.raises(ValueError, match=r"teacher0 and the teacher1 have these classes in different orders"):
        two.fit(data, **ONCE)


def test_a_cache_keeps_the_teachers_names(tmp_path):
    data = folders(tmp_path / "x")
    Distiller(Knows(NAMES[::-1]), Knows(), "kd", input_size=32).cache_teacher(data, tmp_path / "cache", batch_size=8)
    distiller = Distiller(f"cache:{tmp_path / 'cache'}", Knows(NAMES[::-1]), "kd", input_size=32)
    assert distiller.fit(data, data, **ONCE).history[-1]["top1"] == 100
    assert distiller.class_names == NAMES[::-1]


def test_a_student_goes_on_with_a_part_of_its_classes(tmp_path):
    part = folders(tmp_path / "x", ["bee", "dog"])
    assert alone(Knows(NAMES)).fit(part, part, **ONCE).history[-1]["top1"] == 100


class Named(Dataset):
    """Labels that `class_to_idx` and a transform number otherwise than the list of classes."""

    def __init__(self, classes, class_to_idx=None, target_transform=None) -> None:
        self.classes, self.target_transform = classes, target_transform
        if class_to_idx:
            self.class_to_idx = class_to_idx

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Named([("tench", "Tinca tinca"), ("goldfish",)]), ["tench", "goldfish"]),
        (Named(["a", "b"], {"a": 1, "b": 0}), ["b", "a"]),
        (Named(["a", "b"], target_transform=lambda number: 1 - number), ["b", "a"]),
        (Named(["a", "b"], target_transform=lambda number: 0), None),
        (ConcatDataset([Named(["a", "b"]), Named(["a", "b"])]), ["a", "b"]),
    ],
)
def test_names_are_in_the_order_of_the_labels_that_come_out(dataset, expected):
    assert class_names(dataset) == expected


def test_sums_whose_parts_number_other_classes_are_refused(tmp_path):
    parts = [ImageFolder(folders(tmp_path / name, names)) for name, names in (("x", ["ant", "cat"]), ("y", ["bee"]))]
    message = r"is a sum of data sets that number other classes from 0 \(ant, cat; bee\)"
    with pytest.raises(ValueError, match=f"train {message}"):
        alone().fit(ConcatDataset(parts), **ONCE)
    with pytest.raises(ValueError, match=f"val {message}"):
        alone().fit((IMAGES, LABELS), DataLoader(ConcatDataset(parts), 8), **ONCE)
    Distiller(Knows(), Knows(), "kd", input_size=32, ce_weight=0).fit(ConcatDataset(parts), **ONCE)
    alone().fit(Renumbered(ConcatDataset(parts)), **ONCE)


class Renumbered(Dataset):
    """A wrapper of the user's own, which gives each part other numbers."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, label = self.dataset[index]
        return image, label + 2 * (index >= self.dataset.cumulative_sizes[0])


def hugging_face(labels, names=NAMES) -> datasets.Dataset:
    shades = [Image.new("RGB", (32, 32), (SHADES[NAMES[index % 4]],) * 3) for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": shades, "label": labels}, features=features)


@pytest.mark.parametrize("options", [{}, {"balanced_sampling": True}, {"class_weights": "balanced"}])
def test_labels_that_are_no_classes_are_refused_before_training(options):
    good, bad = hugging_face([0, 1, 2, 3] * 4), hugging_face([0, 1, 2, -1] * 4, NAMES[::-1])
    with pytest.raises(ValueError, match=r"image 3 has the label -1, which is none of the classes \(4 of 16 images"):
        alone().fit(bad, **ONCE, **options)
    with pytest.raises(ValueError, match=r"image 3 has the label -1"):
        alone().fit(good, bad, **ONCE)
    assert "label -1" in alone().check(good, bad).problems[0]


def test_samples_that_a_function_makes_need_no_columns():
    data = hugging_face([0, 1, 2, 3] * 4).with_transform(
        lambda batch: {"pixel_values": [tensors(image) for image in batch["image"]], "labels": batch["label"]}
    )
    assert top1(data, data) == 100
    assert top1(data, data, image_key="pixel_values", label_key="labels") == 100


class Dicts(Dataset):
    """Samples with two columns of whole numbers."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        shade = torch.full((3, 32, 32), (index % 4) / 3)
        return {"image": shade, "label": 3 - index % 4, "fine": index % 4}


def test_keys_are_of_datasets_and_exist():
    assert top1(Dicts(), Dicts(), label_key="fine") == 100
    assert "train: labels are in 'fine'" in alone().check(Dicts(), label_key="fine").notes
    with pytest.raises(ValueError, match=r"label_key='fine' is for data sets, but train is a loader"):
        alone().fit(DataLoader(Dicts(), 8), label_key="fine", epochs=1, **QUIET)
    with pytest.raises(ValueError, match=r"label_key='fin' is none of a sample's keys \['fine', 'image', 'label'\]"):
        alone().fit(Dicts(), label_key="fin", **ONCE)


def test_class_weights_follow_the_labels(tmp_path):
    seen = []

    class Look(Callback):
        def on_step(self, moment):
            seen.append(distiller.method.class_weights.tolist())

    distiller = Distiller(Knows(NAMES[::-1]), tiny_cnn(num_classes=4), "kd", input_size=32)
    distiller.fit(folders(tmp_path / "x"), class_weights=[9.0, 1, 1, 2], callbacks=[Look()], **ONCE)
    assert seen[0] == [2, 1, 1, 9]


def test_a_teacher_in_the_students_memory_is_refused():
    teacher, student = Knows(), Knows()
    student.load_state_dict(teacher.state_dict(), assign=True)
    with pytest.raises(ValueError, match="share parameters or statistics"):
        Distiller(teacher, student, "kd", input_size=32)
    teacher, student = tiny_cnn(), tiny_cnn()
    student.bn1.running_mean = teacher.bn1.running_mean
    with pytest.raises(ValueError, match="running_mean"):
        Distiller(teacher, student, "kd", input_size=32)
    with pytest.raises(AttributeError, match="the teacher of a distiller is fixed"):
        Distiller(Knows(), Knows(), "kd", input_size=32).teacher = Knows()


class Stream(IterableDataset):
    """Twenty-four images one after another."""

    def __iter__(self):
        shades = torch.arange(24).remainder(4) / 3
        return iter([(torch.full((3, 32, 32), shade.item()), int(3 * shade)) for shade in shades])


class Batches:
    """Batches without a length, of which Accelerate does not see the end."""

    def __iter__(self):
        return iter(list(DataLoader(Stream(), 8)))


@pytest.mark.parametrize(
    ("data", "windows"),
    [
        (DataLoader(Stream(), 8), [[0, 1], [2], [0, 1], [2]]),
        (Batches(), [[0, 1], [2, 0], [1, 2]]),
    ],
)
def test_the_last_window_of_a_stream_counts_its_own_batches(data, windows):
    student = tiny_cnn(num_classes=4)
    expected = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    batches, run = list(DataLoader(Stream(), 8)), alone(expected)
    for window in windows:
        for index in window:
            (run(*batches[index]).loss / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    options = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "weight_decay": 0.0, "scheduler": "constant"}
    alone(student).fit(data, epochs=2, gradient_accumulation=2, **options, **QUIET)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, msg=name)


def test_probabilities_are_not_negative():
    with pytest.raises(ValueError, match="negative or do not sum to 1"):
        alone()(IMAGES, torch.tensor([[2.0, -1, 0, 0]] * 32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES * 255, LABELS), "images reach 255"),
        ((torch.where(torch.arange(32)[:, None, None, None] == 31, torch.nan, IMAGES), LABELS), "NaN"),
        ((IMAGES, LABELS.int()), "labels have dtype torch.int32"),
    ],
)
def test_check_looks_at_values_as_fit_does(data, message):
    assert message in alone().check(data).problems[0]
    assert message in alone().check((IMAGES, LABELS), data).problems[0]
    with pytest.raises((ValueError, TypeError), match=message):
        alone().fit((IMAGES, LABELS), data, **ONCE)


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, capsys):
    def run(train, val=None, *, resume=True, progress=False, **options):
        made = Distiller(None, tiny_cnn(num_classes=4), "ce", input_size=32, **options)
        how = {"epochs": 1 + resume, "batch_size": 8, "output_dir": tmp_path, "cpu": True, "progress": progress}
        made.fit(train, val, resume=resume, **how)

    images = torch.ones(64, 3, 32, 32)
    changed = images.clone()
    changed[torch.arange(64) % 4 != 0] = 0
    data, labels = (images, torch.arange(64) % 4), (torch.arange(64) + 1) % 4
    run(data, data, resume=False)
    for train, val, options, message in [
        ((images, labels), data, {}, "labels, file names or pixels of train"),
        ((changed, data[1]), data, {}, "labels, file names or pixels of train"),
        (data, data, {"normalized": ((0.5,) * 3, (0.2,) * 3)}, "inputs was"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(train, val, **options)
    capsys.readouterr()
    run(data, (images, labels), progress=True)
    assert "val has other images or labels than before" in capsys.readouterr().out
