"""OFA-KD against the formula of its paper."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import tiny_cnn, tiny_vit
from formulas import softmax

from hetkd import (
    Distiller,
    Stage,
)
from hetkd.methods.ofa import convolutional_exit, enhanced_loss, token_exit


class TestOFA:
    def test_loss_equals_the_paper_in_float64(self):
        s, t, labels = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 2, 4, 4])
        p_s, p_t, y = softmax(s.numpy()), softmax(t.numpy()), np.eye(5)[labels.numpy()]
        expected = np.mean((-((p_t + y) ** 1.4 - y) * np.log(p_s)).sum(1))
        assert enhanced_loss(s, t, labels, 1.4).item() == pytest.approx(expected, rel=1e-9)

    def test_with_gamma_1_it_is_the_cross_entropy_with_the_teacher(self):
        s, t = torch.randn(4, 5), torch.randn(4, 5)
        loss = enhanced_loss(s, t, torch.tensor([0, 2, 4, 4]), 1.0)
        torch.testing.assert_close(loss, F.cross_entropy(s, t.softmax(1)))

    def test_exits_of_shrinking_and_of_isotropic_students(self):
        shrinking = [Stage(f"s{i}", 8 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
        for index, stage in enumerate(shrinking):
            branch = convolutional_exit(stage, 3 - index, 96, 10)
            assert branch(torch.randn(2, stage.channels, *stage.grid)).shape == (2, 10)
        isotropic = [Stage(f"blocks.{i}", 24, 4, 4) for i in range(4)]
        blocks = [token_exit(stage, 3 - i, 10) for i, stage in enumerate(isotropic)]
        assert [len(branch[0].blocks) for branch in blocks] == [3, 2, 1, 1]
        assert all(branch(torch.randn(2, 24, 4, 4)).shape == (2, 10) for branch in blocks)

    def test_exits_are_as_large_as_the_authors(self):
        student = timm.create_model("deit_tiny_patch16_224")
        added = Distiller(timm.create_model("convnext_atto"), student, "ofa").plan.added_parameters
        assert added == pytest.approx(4.5e6, rel=0.02)  # published for DeiT-T, with 1,000 classes

    def test_teacher_maps_are_not_taken(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), "ofa", input_size=32)
        assert distiller.taps["teacher"].names == []
        assert [row.teacher for row in distiller.plan.rows] == ["logits"] * 4 + [""]
