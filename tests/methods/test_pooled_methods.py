"""CC, RKD and RSD against the formulas of their papers."""

import math

import numpy as np
import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from formulas import VECTORS, compared
from torch import nn

from hetkd import (
    CC,
    RKD,
    RSD,
    Distiller,
)
from hetkd.methods.cc import CC as CorrelationCongruence
from hetkd.methods.common.statistics import standardize_batch
from hetkd.methods.rkd import angles, distances
from hetkd.methods.rsd import redundancy


class TestCC:
    def test_neighbours_by_hand(self):
        method = CC(width=2)
        student, teacher = torch.tensor([[1.0, 2.0], [0.0, 1.0], [4.0, 0.0]]), torch.zeros(3, 1)
        compared(method, student, teacher)
        for embed in (method.embed_student[0], method.embed_teacher[0]):
            nn.init.zeros_(embed.bias)
        nn.init.eye_(method.embed_student[0].weight)
        # neighbouring errors: (1, 2) . (0, 1) = 2 and (0, 1) . (4, 0) = 0
        assert compared(method, student, teacher).item() == pytest.approx(1.0)

    def test_kernel_approximates_the_gaussian_one_and_equals_the_paper(self):
        method = CorrelationCongruence(form="kernel", order=12)
        x, y = (torch.randn(6, 9, dtype=torch.float64) for _ in range(2))
        units = [(z / z.norm(dim=1, keepdim=True)).numpy() for z in (x, y)]
        gaussian = [np.exp(-0.4 * ((u[:, None] - u[None]) ** 2).sum(-1)) for u in units]
        expected = ((gaussian[0] - gaussian[1]) ** 2).sum() / 36
        assert compared(method, x, y).item() == pytest.approx(expected, rel=1e-6)
        second_order = CorrelationCongruence(form="kernel")
        taylor = [math.exp(-0.8) * (1 + 0.8 * u @ u.T + (0.8 * u @ u.T) ** 2 / 2) for u in units]
        assert compared(second_order, x, y).item() == pytest.approx(((taylor[0] - taylor[1]) ** 2).mean(), rel=1e-9)
        assert sum(p.numel() for p in second_order.parameters()) == 0


class TestRKD:
    def test_distances_and_angles_by_hand(self):
        x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        expected = torch.tensor([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 4
        torch.testing.assert_close(distances(x), expected)
        cosines = angles(x)
        assert cosines[0, 1, 2].item() == pytest.approx(0.0, abs=1e-7)
        assert cosines[1, 0, 2].item() == pytest.approx(0.6)
        assert cosines[2, 0, 1].item() == pytest.approx(0.8)

    def test_equals_loops_in_float64(self):
        x, y = (torch.randn(5, width, dtype=torch.float64) for width in (3, 4))

        def huber(difference: float) -> float:
            return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5

        def relations(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.array([[np.linalg.norm(a - b) for b in z] for a in z])
            unit = np.array([[(a - b) / max(np.linalg.norm(a - b), 1e-12) for a in z] for b in z])
            return lengths / lengths[lengths > 0].mean(), np.einsum("jid,jkd->jik", unit, unit)

        (d_x, a_x), (d_y, a_y) = relations(x.numpy()), relations(y.numpy())
        expected = 25 * np.mean([huber(e) for e in (d_x - d_y).flat]) + 50 * np.mean(
            [huber(e) for e in (a_x - a_y).flat]
        )
        assert compared(RKD(), x, y).item() == pytest.approx(expected, rel=1e-9)

    def test_ignores_rotation_shift_and_scale_and_has_finite_gradients(self):
        x = torch.randn(6, 4)
        rotation = torch.linalg.qr(torch.randn(4, 4))[0]
        assert compared(RKD(), 3 * x @ rotation + 1, x).abs() < 1e-8
        twice = torch.cat([x[:1], x]).requires_grad_()  # two equal images
        compared(RKD(), twice, torch.randn(7, 5)).backward()
        assert twice.grad.isfinite().all()


class TestRSD:
    def test_equals_numpy_in_float64(self):
        s, t = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
        cross = np.corrcoef(t.numpy().T, s.numpy().T)[:4, 4:]
        on = ((1 - np.diag(cross)) ** 2).sum()
        off = (cross**2).sum() - (np.diag(cross) ** 2).sum()
        assert redundancy(s, t, 0.01).item() == pytest.approx(on + 0.01 * off, rel=1e-6)

    def test_minimum_is_the_identity_correlation(self):
        white = torch.linalg.qr(standardize_batch(torch.randn(16, 5)))[0]
        white = white - white.mean(0)
        white = torch.linalg.qr(white)[0]  # uncorrelated dimensions
        assert redundancy(3 * white + 1, white, 0.01).abs() < 1e-5
        free = torch.randn(16, 5, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(1000):
            optimizer.zero_grad()
            loss = redundancy(free, white, 0.01)
            loss.backward()
            optimizer.step()
        cross = standardize_batch(white).T @ standardize_batch(free.detach()) / 16
        torch.testing.assert_close(cross, torch.eye(5), atol=0.02, rtol=0)

    def test_projector_is_the_papers(self):
        method = RSD()
        method.bind(VECTORS)
        assert [type(layer) for layer in method.project[0]] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
        assert method.project[0][0].out_features == 64
        assert method.project[0][3].out_features == 40


def test_pooled_vectors_are_a_stage_by_name():
    distiller = Distiller(tiny_vit(), tiny_cnn(), "rsd", input_size=32)
    assert [(row.stage, row.teacher, row.student) for row in distiller.plan.rows] == [("pooled", "pooled", "pooled")]
    by_name = Distiller(tiny_vit(), tiny_cnn(), ["rsd", "rkd"], stages=["pooled"], input_size=32)
    assert [row.teacher for row in by_name.plan.rows] == ["pooled", "pooled"]
    at_stages = Distiller(tiny_vit(), tiny_cnn(), "rsd", stages=[2, 3], input_size=32)
    assert len(at_stages.method.pairs) == 2
    of_sfkd = Distiller(tiny_vit(), tiny_cnn(), "sfkd", stages=[3, ("pooled", "pooled")], input_size=32)
    assert of_sfkd(*batch()).loss.isfinite()
