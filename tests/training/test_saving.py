"""What a checkpoint holds, and runs that go on."""

import json
import os
import re
import sys

import kornia.augmentation as K
import pytest
import timm
import timm.optim
import torch
from conftest import REPOSITORY, batch
from running import finish
from training_runs import QUIET, bright_or_dark, make

from hetkd import load_model
from hetkd.training.saving import pack, unpack


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


@pytest.mark.slow
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


def test_precision_may_change_between_runs():
    distiller = make("kd")
    for precision in ("bf16", "no"):
        distiller.fit(bright_or_dark(16), epochs=1, mixed_precision=precision, **QUIET)
    assert distiller.predict(batch()[0]).dtype == torch.float32
    assert "_original_forward" not in vars(distiller)


def test_last_student_survives_a_half_written_file(tmp_path):
    distiller = make("kd")
    distiller.fit(bright_or_dark(16), epochs=1, output_dir=tmp_path, **QUIET)
    assert not list(tmp_path.rglob("*.tmp"))
    load_model("test_resnet", num_classes=10, weights=tmp_path / "last.safetensors")


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    out = finish(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "recipes" / "research" / "torture.py"), "--kills", "20"],
        280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-3000:]
    hits = int(re.search(r"20 kills, (\d+) of them after a first checkpoint", out.stdout).group(1))
    assert hits >= 10
