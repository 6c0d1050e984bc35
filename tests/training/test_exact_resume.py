"""A run that was stopped anywhere equals one that was left alone, bit for bit."""

import importlib
import json
import math
import signal
from contextlib import nullcontext

import kornia.augmentation as K
import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.training import signals


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

    @pytest.mark.parametrize("method", ["sfkd", *(pytest.param(x, marks=pytest.mark.slow) for x in ("crd", "rsd"))])
    def test_within_an_epoch(self, tmp_path, method):
        augment = K.RandomHorizontalFlip(p=0.5)
        options = {"ema": 0.9, "mixup": 0.3, "cutmix": 1.0, "augment": augment, "checkpoint_steps": 1}
        self.check(tmp_path, bright_or_dark(48), (2, 4, 9), method, **options)

    def test_with_accumulated_gradients(self, tmp_path):
        self.check(tmp_path, bright_or_dark(48), (5, 4), "kd", gradient_accumulation=2, checkpoint_steps=2)

    @pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
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
    def test_signals_write_a_checkpoint_first(self, tmp_path, name, error, capsys):
        distiller, data = self.make("kd"), bright_or_dark(48)
        original, calls = distiller.method.forward, 0

        def forward(*args):
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(getattr(signal, name))
            return original(*args)

        distiller.method.forward = forward
        options = {**QUIET, "progress": True, "epochs": 1, "batch_size": 8, "output_dir": tmp_path}
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(error) if error else nullcontext():
            distiller.fit(data, **options)
        numbers = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert "step-000000003" in numbers
        assert calls == (3 if error else 6)
        told = f"saved at step 3; go on with fit(..., output_dir={str(tmp_path)!r}, resume=True)"
        assert (told in capsys.readouterr().out.replace("\n", "")) == (error is not None)
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
            "measure_as_taught",
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
