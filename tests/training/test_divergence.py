"""Runs that diverge."""

import math

import pytest
import torch
from safetensors.torch import load_file
from training_runs import QUIET, bright_or_dark, make

from hetkd import Distiller
from hetkd.training import TrainingDiverged


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
