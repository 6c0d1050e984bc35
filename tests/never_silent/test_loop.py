"""The loop: nothing is counted wrong, nothing is lost, nothing outside is changed."""

import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from conftest import tiny_cnn, tiny_norm_free, tiny_vit
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.training.checkpoint import RunFolder
from hetkd.training.progress import TrainingProgress


def student(method="ce") -> Distiller:
    torch.manual_seed(0)
    return Distiller(None if method == "ce" else tiny_vit(), tiny_norm_free(), method, input_size=32)


def weights(distiller: Distiller) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


@pytest.mark.parametrize(("count", "window"), [(5, 4), (3, 4), (6, 4), (1, 8)])
def test_the_last_window_of_accumulation_weighs_its_own_batches(count, window):
    images, labels = torch.rand(4 * count, 3, 32, 32), torch.arange(4 * count) % 10
    options = {
        "epochs": 1,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "lr": 0.1,
        "scheduler": "constant",
    }
    found, expected = student(), student()
    found.fit(DataLoader(TensorDataset(images, labels), 4), gradient_accumulation=window, **options, **QUIET)
    expected.train()
    optimizer = torch.optim.SGD(expected.student.parameters(), lr=0.1)
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    for start in range(0, count, window):
        part = batches[start : start + window]
        for x, y in part:
            (expected(x, y).loss / len(part)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(found), weights(expected), atol=1e-6, rtol=1e-5)


class Seen:
    """An augmentation that notes the images of a run, which are constant."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def __call__(self, images):
        self.values += (images[:, 0, 0, 0] * 1000).round().int().tolist()
        return images


class Backwards(RandomSampler):
    """A sampler of one's own that is a RandomSampler by inheritance only."""

    def __iter__(self):
        return iter(reversed(range(len(self.data_source))))


class Batches:
    """A batch sampler of one's own: pairs, drawn by NumPy."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(np.random.permutation(16).reshape(8, 2).tolist())


def numbered(count: int = 16) -> TensorDataset:
    images = (torch.arange(count) / 1000)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    return TensorDataset(images, torch.arange(count) % 10)


SAMPLERS = {
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(16)), "batch_size": 4},
    "subset with a generator": lambda data: {
        "sampler": SubsetRandomSampler(range(16), generator=torch.Generator().manual_seed(3)),
        "batch_size": 4,
    },
    "random with a generator": lambda data: {
        "sampler": RandomSampler(data, generator=torch.Generator().manual_seed(3)),
        "batch_size": 4,
    },
    "subclass": lambda data: {"sampler": Backwards(data), "batch_size": 4},
    "batches of one's own": lambda data: {"batch_sampler": Batches()},
    "batch sampler": lambda data: {"batch_sampler": BatchSampler(SubsetRandomSampler(range(16)), 4, False)},
    "shuffle with a generator": lambda data: {
        "shuffle": True,
        "generator": torch.Generator().manual_seed(5),
        "batch_size": 4,
    },
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_image_comes_once_an_epoch_in_the_same_order_again(name):
    orders = []
    for _ in range(2):
        data, seen = numbered(), Seen()
        student().fit(DataLoader(data, **SAMPLERS[name](data)), epochs=2, augment=seen, **QUIET)
        assert sorted(seen.values[:16]) == sorted(seen.values[16:]) == list(range(16))
        orders.append(seen.values)
    assert orders[0] == orders[1]
    if name == "subclass":
        assert orders[0] == [*range(15, -1, -1)] * 2
    else:
        assert orders[0][:16] != orders[0][16:], "epochs differ"


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_with_any_sampler_resume_exactly(name, tmp_path):
    def run(folder, epochs, resume=False):
        data, distiller = numbered(), student()
        distiller.fit(
            DataLoader(data, **SAMPLERS[name](data)),
            epochs=epochs,
            output_dir=folder,
            resume=resume,
            scheduler="constant",
            **QUIET,
        )
        return weights(distiller)

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "cut", 1)
    assert torch.equal(run(tmp_path / "cut", 2, resume=True), whole)


@pytest.mark.parametrize("argument", ["train", "val"])
def test_loaders_that_share_out_already_are_refused(argument):
    data = numbered()
    sharded = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    plain = DataLoader(data, batch_size=4)
    with pytest.raises(ValueError, match=f"{argument} has a DistributedSampler, which shares the data out already"):
        student().fit(*((sharded, None) if argument == "train" else (plain, sharded)), epochs=1, **QUIET)


def test_generators_are_left_as_they_were():
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    distiller, data = student(), bright_or_dark(16)
    torch.manual_seed(7)
    distiller.fit(data, epochs=1, batch_size=8, augment="light", **QUIET)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_the_users_accelerate_state_is_given_back():
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        student().fit(bright_or_dark(16), epochs=1, batch_size=8, **QUIET)
        assert mine.mixed_precision == "bf16"
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_an_error_after_the_preparation_leaves_no_autocast_behind():
    distiller = student()
    with pytest.raises(ValueError, match="train is a loader without a length"):
        distiller.fit(iter([bright_or_dark(4)]), epochs=1, mixed_precision="bf16", **QUIET)
    with pytest.raises(ZeroDivisionError):
        distiller.fit(bright_or_dark(16), epochs=1, augment=lambda x: 1 / 0, mixed_precision="bf16", **QUIET)
    assert distiller(*bright_or_dark(4)).student_logits.dtype == torch.float32


class Broken(GeneralTracker):
    """A tracker whose server goes away after the start."""

    name, requires_logging_directory, main_process_only = "broken", False, True

    def __init__(self) -> None:
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_ends_no_run(tmp_path, capsys):
    result = student().fit(
        bright_or_dark(16), epochs=2, batch_size=8, trackers=[Broken()], output_dir=tmp_path / "run", cpu=True
    )
    assert len(result.history) == len(json.loads((tmp_path / "run" / "history.json").read_text())) == 2
    assert capsys.readouterr().out.count("tracker broken fails and is left out") == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_an_output_that_is_full_or_closed_ends_no_run(tmp_path, monkeypatch, error):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise error

        def flush(self):
            raise error

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Full())
    assert len(student().fit(bright_or_dark(16), epochs=2, batch_size=8, cpu=True).history) == 2


def test_markup_in_a_name_is_printed_as_it_is(capsys):
    with TrainingProgress(1, 1, 0, enabled=True) as progress:
        progress.note("a[/i].png and [bold]b[/bold].png :smile:")
    assert "a[/i].png and [bold]b[/bold].png :smile:" in capsys.readouterr().out


def test_a_damaged_validation_image_is_found_before_the_training(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "val" / "b" / "7.png").write_bytes(b"damaged")
    seen = Seen()
    with pytest.raises(OSError, match=r"b/7\.png cannot be read"):
        Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32).fit(
            tmp_path / "train", tmp_path / "val", epochs=1, batch_size=4, augment=seen, **QUIET
        )
    assert seen.values == []


class FailsLater:
    """A loader of validation data that fails after so many batches of all epochs."""

    def __init__(self, good: int) -> None:
        self.good = good

    def __iter__(self):
        for _ in range(2):
            self.good -= 1
            if self.good < 0:
                raise RuntimeError("the validation data are gone")
            yield bright_or_dark(4)


def test_an_epoch_whose_validation_fails_is_saved(tmp_path):
    with pytest.raises(RuntimeError, match="are gone"):
        student().fit(bright_or_dark(16), FailsLater(3), epochs=3, batch_size=8, output_dir=tmp_path, **QUIET)
    saved = RunFolder(tmp_path, resume=True).load_checkpoint()
    assert saved.values["epoch"] == 2
    assert load_file(tmp_path / "last.safetensors")
    again = student()
    result = again.fit(
        bright_or_dark(16), FailsLater(9), epochs=3, batch_size=8, output_dir=tmp_path, resume=True, **QUIET
    )
    assert [record["epoch"] for record in result.history] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused_and_a_crash_leaves_no_lock(tmp_path):
    folder = RunFolder(tmp_path, resume=False)
    with folder.locked(), pytest.raises(FileExistsError, match="in use by another run"):
        student().fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir=tmp_path, **QUIET)
    (tmp_path / ".lock").touch()  # as a crash leaves it
    student().fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir=tmp_path, **QUIET)


def test_a_last_batch_of_one_image_breaks_no_epoch():
    class Uneven:
        def __len__(self):
            return 3

        def __iter__(self):
            for size in (8, 8, 1):
                yield bright_or_dark(size)

    distiller = Distiller(tiny_vit(), tiny_cnn(), "sfkd", input_size=32)
    assert distiller.fit(Uneven(), epochs=2, **QUIET).history[1]["train/ce"] > 0


def test_newer_options_and_lr_defaults_do_not_hinder_a_resume(tmp_path):
    student().fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir=tmp_path, **QUIET)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["lr"] == 1e-3
    for name in ("half_weights", "image_key", "optimizer_options", "classes"):
        settings.pop(name)
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "lr": None}))
    student().fit(bright_or_dark(16), epochs=2, batch_size=8, output_dir=tmp_path, resume=True, **QUIET)


def test_another_augmentation_is_refused_on_resume(tmp_path):
    student().fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir=tmp_path, augment="light", **QUIET)
    with pytest.raises(ValueError, match="augment was 'light' and is 'strong'"):
        student().fit(
            bright_or_dark(16), epochs=2, batch_size=8, output_dir=tmp_path, augment="strong", resume=True, **QUIET
        )


class OwnRandomness(torch.utils.data.Dataset):
    """A dataset that draws from a generator of its own, as albumentations does."""

    generator = np.random.default_rng()

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.from_numpy(self.generator.random((3, 32, 32), np.float32)), index % 10


def test_data_with_randomness_of_their_own_resume_and_are_said(tmp_path, capsys):
    for epochs in (1, 2):
        student().fit(OwnRandomness(), epochs=epochs, batch_size=8, output_dir=tmp_path, resume=True, cpu=True)
    assert "differ from call to call" in capsys.readouterr().out


def test_a_home_directory_and_the_number_of_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    student().fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir="~/run", cpu=True)
    assert (tmp_path / "run" / "last.safetensors").exists()
    assert "1 process on cpu, 8 images an update, 1 epoch\n" in capsys.readouterr().out


def test_optimizers_as_classes_with_options_and_sgd_without_momentum(tmp_path):
    data = bright_or_dark(16)
    student().fit(data, epochs=1, batch_size=8, optimizer="sgd", momentum=0.0, **QUIET)
    options = {"betas": (0.8, 0.9)}
    student().fit(
        data, epochs=1, batch_size=8, optimizer=torch.optim.RAdam, lr=1e-3, optimizer_options=options,
        output_dir=tmp_path, **QUIET,
    )  # fmt: skip
    assert json.loads((tmp_path / "settings.json").read_text())["optimizer"] == "torch.optim.radam.RAdam"
    distiller = student()
    with pytest.raises(TypeError, match="optimizer=AdamW, with optimizer_options"):
        distiller.fit(data, epochs=1, optimizer=torch.optim.AdamW(distiller.parameters()), **QUIET)


class OfProcess(torch.utils.data.Dataset):
    """Pictures, and who loads them."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
        self.pictures = [Image.fromarray(each) for each in values]
        self.processes = torch.zeros(100, dtype=torch.int64).share_memory_()
        self.loads = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.processes[self.loads] = os.getpid()
        self.loads += 1
        return self.pictures[index], index % 4


def test_loading_processes_outlive_an_epoch_and_load_what_this_one_would():
    trained = []
    for workers in (0, 1):
        data, distiller = OfProcess(), student()
        distiller.fit(data, epochs=3, batch_size=4, num_workers=workers, lr=0.1, **QUIET)
        others = set(data.processes[: data.loads].tolist()) - {os.getpid(), 0}
        assert len(others) == workers
        trained.append(weights(distiller))
    assert torch.equal(*trained)
