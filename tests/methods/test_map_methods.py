"""FitNet and AT against the formulas of their papers."""

import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, STUDENT_STAGES, TEACHER_STAGES, features

from hetkd import (
    AT,
    Features,
    FitNet,
    Stage,
    StagePair,
)


class TestFitNetAndAT:
    def test_fitnet_is_the_mean_squared_error_of_projected_maps(self):
        method = FitNet()
        method.bind([StagePair(Stage("t", 5, 4, 4), Stage("s", 3, 4, 4))])
        x, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
        weight = method.project[0].weight[:, :, 0, 0].detach().double().numpy()
        projected = np.einsum("dc,bchw->bdhw", weight, x.double().numpy())
        expected = np.mean((projected - t.double().numpy()) ** 2)
        loss = method.compare(0, x, method.encode_stage(0, t), None)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_fitnet_standardises_each_value_of_the_teacher_over_the_batch(self):
        method = FitNet(normalize="batch")
        method.bind([StagePair(Stage("t", 5, 4, 4), Stage("s", 5, 4, 4))])
        torch.nn.init.dirac_(method.project[0].weight)
        t = torch.randn(8, 5, 4, 4) * 30 + 7
        t[:, 2] = 4.0  # what never varies in the teacher is 0 for the student
        values = t.double().numpy()
        deviation = values.std(0)
        expected = np.divide(values - values.mean(0), deviation, out=np.zeros_like(values), where=deviation > 1e-6)
        x = torch.from_numpy(expected).float()
        assert method.compare(0, x, method.encode_stage(0, t), None).item() < 1e-8
        assert method.compare(0, -x, method.encode_stage(0, t), None).item() == pytest.approx(4 * 4 / 5, rel=1e-5)
        assert method.batch_statistics == "all"

    def test_at_by_hand(self):
        method = AT(feature_weight=1000)
        method.bind([StagePair(Stage("t", 2, 1, 2), Stage("s", 1, 1, 2))])
        teacher = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]])  # mean squares 5, 2
        student = torch.tensor([[[[0.0, 2.0]]]])  # 0, 4: normalised 0, 1
        length = math.hypot(5, 2)
        expected = ((5 / length) ** 2 + (1 - 2 / length) ** 2) / 2
        terms = method(Features(None, (student,)), method.encode(Features(None, (teacher,))))
        assert terms["at.s"].item() == pytest.approx(1000 * expected, rel=1e-5)

    def test_at_ignores_channels_and_scale_and_meets_on_a_common_grid(self):
        method = AT()
        method.bind(PAIRS)
        x = features(STUDENT_STAGES)
        terms = method(Features(None, x.maps), method.encode(features(TEACHER_STAGES)))
        scaled = Features(None, tuple(5 * x.flip(1) for x in x.maps))
        torch.manual_seed(0)
        same = AT()
        same.bind([StagePair(s, s) for s in STUDENT_STAGES])
        assert all(term < 1e-6 for term in same(scaled, same.encode(Features(None, x.maps))).values())
        assert all(term > 0.01 for term in terms.values())

    def test_at_refuses_a_grid_of_one_pixel_and_skips_it_by_itself(self):
        one = StagePair(Stage("t", 8, 1, 1), Stage("s", 4, 2, 2))
        with pytest.raises(ValueError, match="one pixel"):
            AT().bind([one])
        assert AT().automatic_pairs([*PAIRS, one], None) == PAIRS
