"""Options that steer a run: when it ends and is evaluated, who is told, which parameters and classes count how much."""

import json
import os
import signal
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from conftest import REPOSITORY, tiny_cnn, tiny_vit
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.models import resnet18, vit_b_16
from training_runs import QUIET, bright_or_dark
from transformers import ViTConfig, ViTForImageClassification
from transformers_models import HUGGING_FACE

from hetkd import Distiller
from hetkd.training import Callback, TrainingOptions
from hetkd.training.groups import layers_of, make_optimizer
from hetkd.training.option_types import FitOptions
from hetkd.training.sharding import synchronised_batchnorm


def alone(**options) -> Distiller:
    return Distiller(None, tiny_cnn(**options), "ce", input_size=32)


class OneProcess:
    """Stands for Accelerate's accelerator where only its device is asked for."""

    is_fsdp2 = False
    device = torch.device("cpu")

    class distributed_type:
        value = "NO"


def rates(distiller: Distiller, **options) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by its name."""
    optimizer = make_optimizer(distiller, TrainingOptions(**options), OneProcess())
    names = {id(p): name for name, p in distiller.named_parameters()}
    groups = [(group, group["lr"] * group.get("lr_scale", 1)) for group in optimizer.param_groups]
    return {names[id(p)]: (rate, group["weight_decay"]) for group, rate in groups for p in group["params"]}


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(None, 5, 5), (4, 5, 5), (1, 100, 4), (None, 4, 4)])
def test_max_steps_end_the_run_and_the_schedule(epochs, steps, expected, capsys):
    seen = []

    class Count(Callback):
        def on_step(self, moment):
            seen.append(moment.step)

    data = bright_or_dark(32)
    result = alone().fit(data, data, epochs=epochs, max_steps=steps, batch_size=8, callbacks=[Count()], cpu=True)
    assert seen == list(range(1, expected + 1))
    assert "top1" in result.history[-1]
    assert len(result.history) == -(-expected // 4)
    assert (f"ended after max_steps={steps}" in capsys.readouterr().out) == (expected == steps)


def test_max_steps_give_a_stream_a_schedule():
    def batches():
        while True:
            yield bright_or_dark(8)

    class Stream:
        def __iter__(self):
            return batches()

    result = alone().fit(Stream(), max_steps=6, **QUIET)
    assert result.history[0]["lr"] < 2e-4  # near the end of the cosine
    with pytest.raises(ValueError, match="use max_steps="):
        alone().fit(Stream(), epochs=1, **QUIET)


def test_a_run_of_max_steps_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    data, common = bright_or_dark(32), {"max_steps": 7, "batch_size": 8, **QUIET}
    torch.manual_seed(0)
    whole = alone()
    whole.fit(data, data, output_dir=tmp_path / "whole", **common)

    def interrupt(moment):
        raise KeyboardInterrupt

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        alone().fit(data, data, output_dir=tmp_path / "part", callbacks=[interrupt], **common)
    torch.manual_seed(1)
    resumed = alone()
    resumed.fit(data, data, output_dir=tmp_path / "part", resume=True, **common)
    for name, x in whole.student.state_dict().items():
        assert torch.equal(x, resumed.student.state_dict()[name]), name


def test_the_end_has_to_be_said():
    with pytest.raises(ValueError, match="epochs=10, or max_steps=1000"):
        alone().fit(bright_or_dark(), **QUIET)
    with pytest.raises(ValueError, match="warmup_epochs=1 is not over after max_steps=3"):
        alone().fit(bright_or_dark(), max_steps=3, warmup_epochs=1, batch_size=8, **QUIET)


def test_evaluation_every_few_epochs_and_after_the_last(tmp_path):
    data = bright_or_dark(16)
    result = alone().fit(data, data, epochs=5, eval_every=2, batch_size=8, output_dir=tmp_path, **QUIET)
    assert ["top1" in record for record in result.history] == [False, True, False, True, True]
    assert result.best["epoch"] in (2, 4, 5)
    assert (tmp_path / "best.safetensors").exists()


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, capsys):
    data = bright_or_dark(16)
    frozen = {"epochs": 9, "patience": 2, "batch_size": 8, "lr": 1e-12, "min_lr": 0.0, "cpu": True}
    result = alone().fit(data, data, output_dir=tmp_path, **frozen)
    epochs = int(result.best["epoch"])
    assert len(result.history) == epochs + 2 < 9
    assert f"no epoch was better than epoch {epochs} for 2 evaluations" in capsys.readouterr().out
    again = alone().fit(data, data, output_dir=tmp_path, resume=True, **frozen)
    assert len(again.history) == len(result.history)
    with pytest.raises(ValueError, match="patience=2 needs val"):
        alone().fit(data, epochs=3, patience=2, **QUIET)


def test_callbacks_are_told_everything_in_order(tmp_path):
    told = []

    class Log(Callback):
        def on_start(self, moment):
            told.append(("start", moment.epoch, moment.step))

        def on_step(self, moment):
            assert set(moment.record) == {"ce"}
            told.append(("step", moment.epoch, moment.step))

        def on_epoch(self, moment):
            assert (tmp_path / "last.safetensors").exists()  # saved before anybody is told
            told.append(("epoch", moment.epoch, round(moment.record["epoch"])))

        def on_end(self, moment):
            told.append(("end", moment.epoch, moment.step))

    data = bright_or_dark(16)
    alone().fit(data, data, epochs=2, batch_size=8, callbacks=[Log()], output_dir=tmp_path, **QUIET)
    assert told == [
        ("start", 1, 0),
        ("step", 1, 1),
        ("step", 1, 2),
        ("epoch", 1, 1),
        ("step", 2, 3),
        ("step", 2, 4),
        ("epoch", 2, 2),
        ("end", 2, 4),
    ]


def test_a_callback_ends_a_run_within_an_epoch():
    class StopAt3(Callback):
        def on_step(self, moment):
            if moment.step == 3:
                moment.stop()

    data = bright_or_dark(64)
    result = alone().fit(data, data, epochs=5, batch_size=8, callbacks=[StopAt3()], **QUIET)
    assert len(result.history) == 1
    assert "top1" in result.history[0]
    with pytest.raises(TypeError, match="callbacks has 3"):
        alone().fit(data, epochs=1, callbacks=[3], **QUIET)


@pytest.mark.parametrize(
    "make",
    [tiny_vit, tiny_cnn, resnet18, lambda: ViTForImageClassification(ViTConfig(**HUGGING_FACE[0][1]))],
)
def test_layers_go_from_the_images_to_the_classifier(make):
    model = make()
    layers = layers_of(model)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    numbers = list(layers.values())
    assert numbers[0] == min(numbers) == 0
    assert [name for name, n in layers.items() if n == max(numbers)][-1].endswith("bias")
    assert len(set(numbers)) > 4


def test_layers_of_a_vit_of_torchvision_are_its_blocks():
    with torch.device("meta"):
        layers = layers_of(vit_b_16())
    assert (
        layers["encoder.layers.encoder_layer_0.mlp.0.weight"] + 11
        == layers["encoder.layers.encoder_layer_11.mlp.0.weight"]
    )


def test_layer_decay_and_another_rate_for_the_method():
    distiller = Distiller(tiny_vit(), tiny_vit(depth=2, embed_dim=16), "fitnet", input_size=32)
    found = rates(distiller, lr=1.0, layer_decay=0.5, method_lr=3.0, weight_decay=0.1)
    assert found["student.head.weight"] == (1.0, 0.1)
    assert found["student.head.bias"] == (1.0, 0.0)
    assert found["student.blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["student.blocks.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert found["student.pos_embed"] == (0.125, 0.0)
    assert {rate for name, (rate, _) in found.items() if name.startswith("method.")} == {3.0}
    assert set(found) == {name for name, _ in distiller.named_parameters()}


def test_rates_of_layers_keep_their_ratio_through_the_schedule():
    seen = []

    class Rates(Callback):
        def on_step(self, moment):
            groups = moment.distiller.optimizer_seen.param_groups
            seen.append([group["lr"] for group in groups])

    distiller = Distiller(None, tiny_vit(), "ce", input_size=32)
    made = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    distiller.__dict__["optimizer_seen"] = None

    def note(moment):
        distiller.__dict__["optimizer_seen"] = made[0]

    class Start(Callback):
        def on_start(self, moment):
            note(moment)

    options = {"optimizer": Optimizer, "lr": 1e-3, "layer_decay": 0.5, "warmup_epochs": 0.5, "epochs": 2}
    distiller.fit(bright_or_dark(32), batch_size=8, callbacks=[Start(), Rates()], **options, **QUIET)
    ratios = {round(max(rates) / min(rates), 3) for rates in seen}
    assert ratios == {2.0**5}
    assert 8e-4 < max(max(rates) for rates in seen) <= 1e-3


@pytest.mark.parametrize("stops_at", [1, 2])
def test_whatever_ends_a_run_its_last_epoch_is_evaluated(stops_at, tmp_path):
    def stop(moment):
        if moment.epoch == stops_at:
            moment.stop()

    data = bright_or_dark(16)
    options = {"epochs": 9, "eval_every": 5, "batch_size": 8, "output_dir": tmp_path, "callbacks": [stop], **QUIET}
    result = alone().fit(data, data, **options)
    assert len(result.history) == stops_at
    assert result.best["epoch"] == stops_at
    assert (tmp_path / "best.safetensors").exists()


def test_accumulated_steps_end_with_a_whole_update():
    seen = []

    class Count(Callback):
        def on_step(self, moment):
            seen.append(moment.step)

    data = bright_or_dark(40)
    alone().fit(data, max_steps=3, gradient_accumulation=2, batch_size=8, callbacks=[Count()], **QUIET)
    assert seen == [1, 2, 3, 4]


def test_keyword_options_reach_timms_optimizers():
    optimizer = make_optimizer(alone(), TrainingOptions(optimizer_options={"betas": (0.8, 0.9)}), OneProcess())
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_synchronised_batch_norms_are_put_back():
    class Cuda:
        device = torch.device("cuda")

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4)).eval()
    before = dict(model.named_modules())
    with synchronised_batchnorm(model, Cuda()):
        assert isinstance(model[1], nn.SyncBatchNorm)
        assert model[1].weight is before["1"].weight
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match="GPUs only"), synchronised_batchnorm(model, OneProcess()):
        pass


def test_typed_options_are_those_of_fit():
    assert get_type_hints(FitOptions) == get_type_hints(TrainingOptions)
    assert list(get_type_hints(FitOptions)) == list(TrainingOptions.__dataclass_fields__)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from training_runs import bright_or_dark
from conftest import tiny_cnn
from hetkd import Distiller
class Slow(torch.utils.data.Dataset):
    def __init__(self): self.data = bright_or_dark(64)
    def __len__(self): return 64
    def __getitem__(self, i):
        time.sleep(0.05)
        return self.data[0][i], int(self.data[1][i])
from hetkd.training import Callback
class Say(Callback):
    def on_step(self, moment): print("under way", flush=True)
distiller = Distiller(None, tiny_cnn(), "ce", input_size=32)
distiller.fit(Slow(), epochs=50, batch_size=4, output_dir={output!r}, callbacks=[Say()], cpu=True)
"""


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_without_a_traceback(tmp_path):
    code = SCRIPT.format(tests=str(REPOSITORY / "tests"), output=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "under way" in line:
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert "saved at step" in out
    assert "resume=True" in out
    assert "Traceback" not in error
    assert process.returncode in (-signal.SIGINT, 130)  # which shells call 130
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["epochs"] == 50
