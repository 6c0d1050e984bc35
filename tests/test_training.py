"""Training end to end on small real models."""

import copy
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext

import kornia.augmentation as K
import pytest
import timm
import timm.optim
import torch
from accelerate.tracking import GeneralTracker
from conftest import REPOSITORY, batch, tiny_cnn, tiny_vit
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms.functional import to_pil_image

from hetkd import Distiller, load_model
from hetkd.data.images import UnreadableImage
from hetkd.training import TrainingDiverged, TrainingOptions, signals
from hetkd.training.batches import TargetMaker
from hetkd.training.saving import pack, unpack

QUIET = {"progress": False, "cpu": True}


def make(method="sfkd", **kwargs) -> Distiller:
    torch.manual_seed(0)
    return Distiller(tiny_vit(), tiny_cnn(), method, input_size=64, **kwargs)


def bright_or_dark(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of brightness: easy to learn."""
    labels = torch.arange(count) % 10
    images = (labels[:, None, None, None] / 10 + 0.05 * torch.rand(count, 3, 32, 32)).clamp(0, 1)
    return images, labels


def test_learns_and_reports(tmp_path, capsys):
    data = bright_or_dark(80)
    distiller = make("ce")
    before = distiller.evaluate(data)
    result = distiller.fit(data, data, epochs=6, output_dir=tmp_path / "run", batch_size=16, lr=3e-3, cpu=True)
    assert len(result.history) == 6
    assert result.best["top1"] > before["top1"] + 20
    assert result.best["top1"] == max(record["top1"] for record in result.history)
    assert {"epoch", "lr", "train/ce", "images_per_second", "seconds", "top1", "top5", "loss"} <= set(result.history[0])
    assert result.history[0]["lr"] > result.history[-1]["lr"]
    out = capsys.readouterr().out
    assert "epoch   6/6" in out
    assert "val top-1" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "history.json",
        "settings.json",
        "plan.txt",
        "checkpoints",
    }
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result.history
    best = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "run" / "best.safetensors"))
    assert make(
        "ce",
    ).evaluate(data) != distiller.evaluate(data)
    again = Distiller(None, best, "ce", input_size=64).evaluate(data)
    assert again["top1"] == pytest.approx(result.best["top1"])
    assert distiller.evaluate(data)["top1"] == pytest.approx(result.history[-1]["top1"])


def test_evaluate_equals_a_computation_by_hand():
    images, labels = batch(23)
    distiller = make("kd")
    metrics = distiller.evaluate((images, labels), batch_size=7)
    with torch.no_grad():
        logits = distiller.eval().predict(images)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * top5)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("method", ["kd", "sfkd"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, method):
    data = bright_or_dark(48)
    options = {**QUIET, "batch_size": 16, "ema": 0.9, "mixup": 0.2, "augment": K.RandomHorizontalFlip(p=0.5)}
    whole = make(method)
    expected = whole.fit(data, data, epochs=3, output_dir=tmp_path / "a", **options)

    class Interrupt(Exception):
        pass

    stopped = make(method)
    calls = 0
    original = stopped.method.forward

    def interrupting(*args):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupt
        return original(*args)

    stopped.method.forward = interrupting
    with pytest.raises(Interrupt):
        stopped.fit(data, data, epochs=3, output_dir=tmp_path / "b", **options)
    resumed = make(method)
    result = resumed.fit(data, data, epochs=3, output_dir=tmp_path / "b", resume=True, **options)
    timing = ("seconds", "images_per_second")
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [("adamw", torch.channels_last), ("lamb", torch.contiguous_format), ("adafactorbv", torch.contiguous_format)],
)
def test_a_run_resumes_exactly_with_any_optimizer_and_layout(tmp_path, optimizer, layout):
    def make_laid_out():
        distiller = make("kd")
        distiller.student.to(memory_format=layout)
        return distiller

    data = bright_or_dark(32)
    options = {**QUIET, "batch_size": 8, "optimizer": optimizer, "lr": 1e-3, "scheduler": "constant"}
    whole, resumed = make_laid_out(), make_laid_out()
    whole.fit(data, epochs=2, **options)
    make_laid_out().fit(data, epochs=1, output_dir=tmp_path, **options)
    resumed.fit(data, epochs=2, output_dir=tmp_path, resume=True, **options)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key


def of_timm() -> list[str]:
    """Names of timm's optimizers, but for those that need other packages, CUDA or gradients of gradients."""
    others = ("bnb", "fused", "adahessian")
    return [name for name in timm.optim.list_optimizers() if not name.startswith(others)]


@pytest.mark.filterwarnings("ignore")  # of the optimizers
@pytest.mark.parametrize("name", of_timm())
def test_state_of_every_optimizer_goes_through_a_checkpoint(name):
    def make_model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        return model, timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.01)

    def step(model, optimizer):
        torch.manual_seed(1)  # some optimizers are random
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make_model_and_optimizer()
    for _ in range(2):
        step(model, optimizer)
    tensors, values = pack(optimizer.state_dict())
    again, other = make_model_and_optimizer()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(unpack({k: x.clone() for k, x in tensors.items()}, json.loads(json.dumps(values))))
    for pair in ((model, optimizer), (again, other)):
        step(*pair)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_checkpoint_cannot_hold_is_refused():
    with pytest.raises(TypeError, match=r"state\.0\.clock holds <object"):
        pack({"state": {0: {"clock": object()}}})


def test_resume_without_a_checkpoint_starts(tmp_path):
    result = make("kd").fit(bright_or_dark(16), epochs=1, output_dir=tmp_path, resume=True, **QUIET)
    assert len(result.history) == 1
    assert result.best == result.history[-1]


def test_same_seed_same_run():
    runs = []
    for _ in range(2):
        distiller = make()
        distiller.fit(bright_or_dark(32), epochs=2, batch_size=8, **QUIET)
        runs.append(distiller.student.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_accumulated_gradients_equal_those_of_a_large_batch():
    data = bright_or_dark(32)
    weights = []
    for batch_size, accumulation in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        student = timm.create_model("test_convnext", num_classes=10, drop_path_rate=0.0)
        distiller = Distiller(tiny_vit(), student, "kd", input_size=64)
        distiller.fit(
            data, epochs=1, batch_size=batch_size, gradient_accumulation=accumulation, optimizer="sgd", lr=0.01, **QUIET
        )
        weights.append(distiller.student.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"mixed_precision": "bf16"}, {"clip_grad": 1.0, "label_smoothing": 0.1}, {"cutmix": 1.0, "mixup": 0.8}]
)
def test_options_train_with_finite_terms(options):
    result = make().fit(
        bright_or_dark(32), epochs=1, batch_size=16, warmup_epochs=0.5, optimizer="sgd", **options, **QUIET
    )
    assert all(value == value for value in result.history[0].values())


def test_a_polynomial_schedule_is_a_straight_line():
    result = make("kd").fit(bright_or_dark(8), epochs=4, batch_size=2, lr=1e-3, scheduler="poly", **QUIET)
    assert [record["lr"] for record in result.history][:2] == pytest.approx([1e-3 * 13 / 16, 1e-3 * 9 / 16], rel=1e-2)


def test_a_stream_trains_where_nothing_needs_its_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*bright_or_dark(16), strict=True)

    result = make("kd").fit(DataLoader(Stream(), batch_size=8), epochs=1, scheduler="constant", **QUIET)
    assert result.history[0]["train/kd"] > 0


def test_a_refused_run_leaves_the_distiller_as_it_was():
    distiller, (images, labels) = make("sfkd"), bright_or_dark(9)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    with pytest.raises(ValueError, match="last batch of train has one image"):
        distiller.fit(loader, epochs=1, mixed_precision="bf16", **QUIET)
    assert distiller(images, labels).student_logits.dtype == torch.float32


def test_precision_may_change_between_runs():
    distiller = make("kd")
    for precision in ("bf16", "no"):
        distiller.fit(bright_or_dark(16), epochs=1, mixed_precision=precision, **QUIET)
    assert distiller.predict(batch()[0]).dtype == torch.float32
    assert "_original_forward" not in vars(distiller)


def test_label_smoothing_and_mixing_make_soft_labels():
    distiller = make("kd")
    images, labels = batch(4)
    smooth = TargetMaker(TrainingOptions(label_smoothing=0.1), distiller.classes)(images, labels)
    assert torch.equal(smooth[0], images)
    torch.testing.assert_close(smooth[1].sum(1), torch.ones(4))
    assert smooth[1].max().item() == pytest.approx(0.91)
    mixed_images, mixed = TargetMaker(TrainingOptions(mixup=1.0), distiller.classes)(
        (images * 255).to(torch.uint8), labels
    )
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    assert mixed_images.min() >= 0
    assert mixed_images.max() <= 1


def test_ema_ends_in_the_student():
    data = bright_or_dark(32)
    plain, averaged = make("ce"), make("ce")
    plain.fit(data, epochs=2, batch_size=8, **QUIET)
    result = averaged.fit(data, data, epochs=2, batch_size=8, ema=0.99, **QUIET)
    assert not torch.equal(plain.student.fc.weight, averaged.student.fc.weight)
    assert averaged.evaluate(data)["top1"] == pytest.approx(result.history[-1]["top1"])


def test_loaders_datasets_dicts_and_folders(tmp_path):
    images, labels = bright_or_dark(20)
    loader = DataLoader(TensorDataset(images, labels), batch_size=10)
    dicts = [{"image": Image.new("RGB", (40, 30), (10 * k, 0, 0)), "label": k} for k in range(10)]
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (50, 40), 40 * index).save(tmp_path / split / name / f"{index}.png")
    distiller = make("kd")
    distiller.fit(loader, loader, epochs=1, **QUIET)
    distiller.fit(dicts, dicts, epochs=1, batch_size=5, **QUIET)
    distiller.fit(tmp_path / "train", str(tmp_path / "val"), epochs=1, batch_size=4, num_workers=1, **QUIET)
    distiller.fit(((pair for pair in [(images, labels)])), epochs=1, scheduler="constant", **QUIET)


def test_one_channel_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(4):
        Image.new("RGB", (50, 40), (40 * index, 0, 0)).save(tmp_path / "a" / f"{index}.png")
    Distiller(None, tiny_cnn(in_chans=1), "ce", input_size=32).fit(tmp_path, epochs=1, batch_size=2, **QUIET)


def test_weight_decay_spares_what_the_student_says():
    distiller = Distiller(tiny_cnn(), tiny_vit(), "kd")
    assert {"student.pos_embed", "student.cls_token"} <= distiller.no_weight_decay()


def test_last_student_survives_a_half_written_file(tmp_path):
    distiller = make("kd")
    distiller.fit(bright_or_dark(16), epochs=1, output_dir=tmp_path, **QUIET)
    assert not list(tmp_path.rglob("*.tmp"))
    load_model("test_resnet", num_classes=10, weights=tmp_path / "last.safetensors")


def test_a_frozen_student_is_refused_by_fit_and_can_be_evaluated():
    student = tiny_cnn().requires_grad_(False)
    d = Distiller(tiny_vit(), student, "kd", input_size=32)
    data = batch(8, 32)
    assert 0 <= d.evaluate(data)["top1"] <= 100
    with pytest.raises(ValueError, match=r"frozen: call student.requires_grad_\(True\)"):
        d.fit(data, epochs=1, batch_size=4)


class TestWithoutLabels:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))

    def distiller(self, **options) -> Distiller:
        return Distiller(tiny_vit(), tiny_cnn(), "rsd", ce_weight=0.0, input_size=32, **options)

    def as_folder(self, folder) -> str:
        folder.mkdir()
        for index, image in enumerate(self.images):
            to_pil_image(image).save(folder / f"{index}.png")
        return str(folder)

    @pytest.mark.parametrize("kind", ["tensor", "dataset", "loader", "folder"])
    def test_images_alone_train_a_student(self, kind, tmp_path):
        data = {
            "tensor": lambda: self.images,
            "dataset": lambda: [to_pil_image(image) for image in self.images],
            "loader": lambda: DataLoader(TensorDataset(self.images), batch_size=8),
            "folder": lambda: self.as_folder(tmp_path / "images"),
        }[kind]()
        distiller = self.distiller()
        before = copy.deepcopy(distiller.student.state_dict())
        result = distiller.fit(data, epochs=1, batch_size=8, progress=False)
        assert result.history[0]["train/rsd.pooled"] > 0
        assert any(not torch.equal(before[name], x) for name, x in distiller.student.state_dict().items())

    def test_cross_entropy_without_labels_is_refused(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32)
        with pytest.raises(ValueError, match="use ce_weight=0"):
            distiller.fit(self.images, epochs=1, batch_size=8, progress=False)
        with pytest.raises(ValueError, match="need labels"):
            self.distiller().fit(self.images, epochs=1, batch_size=8, mixup=0.2, progress=False)
        with pytest.raises(ValueError, match="leave val out"):
            self.distiller().fit(self.images, self.images, epochs=1, batch_size=8, progress=False)


class Stop(Exception):
    pass


def stop_after(distiller: Distiller, steps: int) -> None:
    """Makes a training raise in the forward pass after so many steps."""
    original, calls = distiller.method.forward, 0

    def forward(*args):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise Stop
        return original(*args)

    distiller.method.forward = forward


def without_timing(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in history]


class TestExactResume:
    def make(self, method) -> Distiller:
        torch.manual_seed(0)
        student = tiny_cnn(drop_path_rate=0.2, drop_rate=0.1)
        return Distiller(tiny_vit(), student, method, input_size=32)

    def check(self, tmp_path, data, stops, method="sfkd", **options) -> None:
        options = {**QUIET, "epochs": 3, "batch_size": 8, "log_every": 3, **options}
        whole = self.make(method)
        expected = whole.fit(data, **options, output_dir=tmp_path / "whole")
        for stop in stops:
            stopped = self.make(method)
            stop_after(stopped, stop)
            with pytest.raises(Stop):
                stopped.fit(data, **options, output_dir=tmp_path / "cut", resume=True)
        resumed = self.make(method)
        found = resumed.fit(data, **options, output_dir=tmp_path / "cut", resume=True)
        assert without_timing(found.history) == without_timing(expected.history)
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    @pytest.mark.parametrize("method", ["sfkd", "crd", "rsd"])
    def test_within_an_epoch(self, tmp_path, method):
        augment = K.RandomHorizontalFlip(p=0.5)
        options = {"ema": 0.9, "mixup": 0.3, "cutmix": 1.0, "augment": augment, "checkpoint_steps": 1}
        self.check(tmp_path, bright_or_dark(48), (2, 4, 9), method, **options)

    def test_with_accumulated_gradients(self, tmp_path):
        self.check(tmp_path, bright_or_dark(48), (5, 4), "kd", gradient_accumulation=2, checkpoint_steps=2)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_with_random_crops_of_pictures_in_a_folder(self, tmp_path, workers):
        generator = torch.Generator().manual_seed(3)
        for index in range(32):
            folder = tmp_path / "images" / f"class{index % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 40, 40, generator=generator)).save(folder / f"{index}.png")
        self.check(tmp_path, str(tmp_path / "images"), (3, 4), "kd", num_workers=workers, checkpoint_steps=1)

    def test_with_a_loader_of_ones_own(self, tmp_path):
        loader = DataLoader(TensorDataset(*bright_or_dark(48)), batch_size=8, shuffle=True)
        self.check(tmp_path, loader, (2, 7), "kd", checkpoint_steps=1)

    def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(self, tmp_path):
        data, options = bright_or_dark(32), {**QUIET, "epochs": 2, "batch_size": 8, "checkpoint_steps": 1}
        expected = self.make("kd").fit(data, **options, output_dir=tmp_path / "whole")
        stopped = self.make("kd")
        stop_after(stopped, 6)
        with pytest.raises(Stop):
            stopped.fit(data, **options, output_dir=tmp_path / "cut", keep_last=3)
        checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == [f"step-{step:09d}" for step in (4, 5, 6)]
        weights = checkpoints[-1] / "state.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        (checkpoints[-2] / "manifest.json").unlink()
        with pytest.warns(RuntimeWarning, match="step-00000000[56] is damaged"):
            found = self.make("kd").fit(data, **options, output_dir=tmp_path / "cut", resume=True)
        assert without_timing(found.history) == without_timing(expected.history)

    def test_old_checkpoints_go_and_half_written_ones_too(self, tmp_path):
        options = {**QUIET, "epochs": 1, "batch_size": 8, "checkpoint_steps": 1, "keep_last": 1}
        stopped = self.make("kd")
        stop_after(stopped, 3)
        with pytest.raises(Stop):
            stopped.fit(bright_or_dark(32), **options, output_dir=tmp_path)
        (tmp_path / "checkpoints" / ".step-000000004.tmp").mkdir()
        self.make("kd").fit(bright_or_dark(32), **options, output_dir=tmp_path, resume=True)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]

    @pytest.mark.parametrize(
        ("name", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit), ("SIGUSR1", None)]
    )
    def test_signals_write_a_checkpoint_first(self, tmp_path, name, error):
        distiller, data = self.make("kd"), bright_or_dark(48)
        original, calls = distiller.method.forward, 0

        def forward(*args):
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(getattr(signal, name))
            return original(*args)

        distiller.method.forward = forward
        options = {**QUIET, "epochs": 1, "batch_size": 8, "output_dir": tmp_path}
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(error) if error else nullcontext():
            distiller.fit(data, **options)
        numbers = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert "step-000000003" in numbers
        assert calls == (3 if error else 6)
        assert signal.getsignal(signal.SIGTERM) is before

    def test_going_back_forgets_gradients_that_were_accumulated(self, tmp_path):
        distiller, calls = self.make("kd"), 0

        def augment(images):
            nonlocal calls
            calls += 1
            return images * float("nan") if calls == 6 else images

        options = {**QUIET, "epochs": 1, "batch_size": 4, "gradient_accumulation": 4, "log_every": 1}
        result = distiller.fit(
            bright_or_dark(64), augment=augment, output_dir=tmp_path, checkpoint_steps=4, returns=1, **options
        )
        assert math.isfinite(result.history[-1]["train/ce"])
        assert calls == 6 + 12

    def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(self, monkeypatch):
        def busy(value, device):
            signal.raise_signal(signal.SIGTERM)
            return value

        with signals.Signals(enabled=True) as heeded:
            with monkeypatch.context() as context:
                context.setattr(signals, "largest_of_processes", busy)
                heeded.agree(torch.device("cpu"))
            heeded.obey()  # nothing was agreed on yet
            heeded.agree(torch.device("cpu"))
            with pytest.raises(SystemExit):
                heeded.obey()

    def test_the_checkpoint_of_the_best_epoch_stays_if_asked_for(self, tmp_path, monkeypatch):
        accuracies = iter([20.0, 50.0, 30.0, 40.0])
        monkeypatch.setattr(
            importlib.import_module("hetkd.training.fit"),
            "measure",
            lambda *_: {"top1": next(accuracies), "top5": 0.0, "loss": 1.0},
        )
        options = {**QUIET, "epochs": 4, "batch_size": 16, "keep_last": 1, "keep_best": True}
        self.make("kd").fit(bright_or_dark(32), bright_or_dark(16), **options, output_dir=tmp_path)
        kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert kept == ["step-000000004", "step-000000008"]

    def test_a_launcher_that_passes_a_keystroke_on_does_not_stop_the_saving(self, monkeypatch):
        seconds = iter([0.0, 0.2, 0.2, 5.0])
        monkeypatch.setattr(signals.time, "monotonic", lambda: next(seconds))
        with signals.Signals(enabled=True) as heeded:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert heeded.received == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_other_data_another_teacher_and_fewer_epochs_are_refused(self, tmp_path):
        data, options = bright_or_dark(48), {**QUIET, "epochs": 2, "batch_size": 8, "output_dir": tmp_path}
        self.make("kd").fit(data, **options)
        with pytest.raises(ValueError, match="train_data was"):
            self.make("kd").fit((1 - data[0], data[1]), **options, resume=True)
        with pytest.raises(ValueError, match="train_images was 48 and is 40"):
            self.make("kd").fit((data[0][:40], data[1][:40]), **options, resume=True)
        other = self.make("kd")
        torch.nn.init.ones_(other.teacher.head.bias)
        with pytest.raises(ValueError, match="teachers was"):
            other.fit(data, **options, resume=True)
        with pytest.raises(ValueError, match="epochs=1, but the run has trained more"):
            self.make("kd").fit(data, **{**options, "epochs": 1}, resume=True)
        with pytest.raises(ValueError, match="returns=2 needs an output_dir"):
            self.make("kd").fit(data, **QUIET, epochs=1, returns=2)

    def test_another_number_of_processes_is_said(self, tmp_path, capsys):
        data, options = bright_or_dark(48), {"cpu": True, "epochs": 2, "batch_size": 8, "checkpoint_steps": 2}
        stopped = self.make("kd")
        stop_after(stopped, 5)
        with pytest.raises(Stop):
            stopped.fit(data, **options, progress=False, output_dir=tmp_path)
        settings = json.loads((tmp_path / "settings.json").read_text())
        of_two = {**settings, "processes": 2, "effective_batch_size": 16}  # as if two had trained
        (tmp_path / "settings.json").write_text(json.dumps(of_two))
        result = self.make("kd").fit(data, **options, output_dir=tmp_path, resume=True)
        assert "processes was 2 and is 1" in capsys.readouterr().out
        assert len(result.history) == 2


def test_twenty_kills_change_nothing(tmp_path):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "recipes" / "torture.py"), "--kills", "20"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-3000:]
    hits = int(re.search(r"20 kills, (\d+) of them after a first checkpoint", out.stdout).group(1))
    assert hits >= 10


class TestUnreadableImages:
    def folder(self, path) -> str:
        for index in range(16):
            (path / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 40, 40)).save(path / f"class{index % 2}" / f"{index:02}.png")
        (path / "class0" / "04.png").write_bytes(b"no picture")
        whole = (path / "class1" / "07.png").read_bytes()
        (path / "class1" / "07.png").write_bytes(whole[: len(whole) // 2])
        return str(path)

    def fit(self, folder, **options):
        distiller = Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32)
        return distiller.fit(folder, epochs=2, batch_size=8, cpu=True, **options)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_they_end_the_run_with_their_path(self, tmp_path, workers):
        with pytest.raises(UnreadableImage, match=r"class[01]/0[47]\.png cannot be read.*unreadable='skip'"):
            self.fit(self.folder(tmp_path), num_workers=workers, progress=False)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_or_they_are_skipped_counted_and_named(self, tmp_path, workers, capsys):
        result = self.fit(self.folder(tmp_path), num_workers=workers, unreadable="skip")
        assert result.history[-1]["unreadable_images"] == 2
        out = capsys.readouterr().out
        assert "2 images cannot be read and were skipped" in out
        assert "04.png" in out
        assert "07.png" in out


def test_out_of_memory_names_the_batch_and_what_to_do():
    distiller = make("kd")

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    distiller.method.forward = too_large
    with pytest.raises(torch.OutOfMemoryError, match="16 images does not fit in memory: batch_size=8 with"):
        distiller.fit(bright_or_dark(32), epochs=1, batch_size=16, **QUIET)


class TestDivergence:
    def broken_at(self, calls_that_break, weights=False) -> Distiller:
        distiller, calls = make("kd"), 0
        original = distiller.method.forward

        def forward(*args):
            nonlocal calls
            calls += 1
            terms = original(*args)
            if calls not in calls_that_break:
                return terms
            if weights:  # the loss is a number, its gradient is none
                zero = next(distiller.student.parameters()).flatten()[0] * 0
                return {**terms, "kd": terms["kd"] + torch.sqrt(zero * zero)}
            return {**terms, "kd": terms["kd"] * float("nan")}

        distiller.method.forward = forward
        return distiller

    options = {**QUIET, "epochs": 2, "batch_size": 8, "checkpoint_steps": 2}

    def test_goes_back_as_often_as_allowed(self, tmp_path):
        distiller = self.broken_at({6, 9})
        result = distiller.fit(bright_or_dark(32), **self.options, output_dir=tmp_path / "a", returns=2)
        assert len(result.history) == 2
        assert all(math.isfinite(record["train/kd"]) for record in result.history)
        with pytest.raises(TrainingDiverged, match="'kd' is nan"):
            self.broken_at({6, 9}).fit(bright_or_dark(32), **self.options, output_dir=tmp_path / "b", returns=1)

    def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(self, tmp_path):
        with pytest.raises(TrainingDiverged, match="before its first checkpoint"):
            self.broken_at({1}).fit(bright_or_dark(32), **self.options, output_dir=tmp_path, returns=3)

    def test_broken_weights_get_into_no_checkpoint(self, tmp_path):
        with pytest.raises(TrainingDiverged, match=r"the weight 'student.*' became NaN or Inf in epoch 2"):
            self.broken_at({6}, weights=True).fit(bright_or_dark(32), **self.options, output_dir=tmp_path)
        for path in (tmp_path / "checkpoints").glob("*/state.safetensors"):
            assert all(x.isfinite().all() for x in load_file(path).values() if x.is_floating_point())
        assert all(x.isfinite().all() for x in load_file(tmp_path / "last.safetensors").values())


def test_trackers_get_settings_and_every_epoch(tmp_path):
    class Notes(GeneralTracker):
        name = "notes"
        requires_logging_directory = False
        settings, records = {}, []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.settings.update(values)

        def log(self, values, step, **kwargs):
            self.records.append((step, values))

    make("kd").fit(bright_or_dark(32), epochs=2, batch_size=16, trackers=[Notes()], **QUIET)
    assert Notes.settings["effective_batch_size"] == 16
    assert [step for step, _ in Notes.records] == [1, 2]
    assert all(values["train/kd"] > 0 for _, values in Notes.records)
    with pytest.raises(ValueError, match="'tensorbord', which is not installed or unknown"):
        make("kd").fit(bright_or_dark(16), epochs=1, trackers=["tensorbord"], **QUIET)
    with pytest.raises(TypeError, match="must be a list"):
        make("kd").fit(bright_or_dark(16), epochs=1, trackers="wandb", **QUIET)
