"""CRD against the formula of its paper."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import VECTORS, compared

from hetkd import (
    CRD,
)
from hetkd.methods.crd import Memory


def vectors(size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 32), torch.randn(size, 40)


class TestCRD:
    def test_first_step_equals_loops_in_float64(self):
        memory = Memory(8, 3, 0.5).train()
        student, teacher = (F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1) for _ in range(2))
        labels = torch.tensor([0, 1, 0, 2])
        u_s = np.exp((student @ teacher.T).numpy() / 0.5)
        u_t = u_s.T / u_s.mean()
        u_s = u_s / u_s.mean()
        expected = 0.0
        for u in (u_s, u_t):
            for b in range(4):
                others = [j for j in range(4) if labels[j] != labels[b]]
                n = len(others)
                expected -= math.log(u[b, b] / (u[b, b] + n)) / 4
                expected -= sum(math.log(n / (u[b, j] + n)) for j in others) / 4
        assert memory(student, teacher, labels).item() == pytest.approx(expected, rel=1e-6)

    def test_memory_holds_the_latest_whatever_the_order(self):
        memory = Memory(5, 2, 0.1).train()
        stored = [F.normalize(torch.randn(3, 2), dim=1) for _ in range(3)]
        for step, x in enumerate(stored):
            memory(x, -x, torch.full((3,), step))
        latest = torch.cat(stored)[-5:]
        order = memory.vectors[:, 0, 0].argsort()
        torch.testing.assert_close(memory.vectors[order, 0], latest[latest[:, 0].argsort()])
        torch.testing.assert_close(memory.vectors[:, 1], -memory.vectors[:, 0])
        assert sorted(memory.keys.tolist()) == [1, 1, 2, 2, 2]

    def test_one_batch_may_be_longer_than_the_memory(self):
        memory = Memory(4, 2, 0.1).train()
        x = F.normalize(torch.randn(7, 2), dim=1)
        memory(x, x, torch.arange(7))
        assert sorted(memory.keys.tolist()) == [3, 4, 5, 6]
        memory(x[:2], x[:2], torch.tensor([7, 8]))
        assert sorted(memory.keys.tolist()) == [5, 6, 7, 8]

    def test_images_of_the_same_class_are_no_negatives(self):
        memory = Memory(16, 4, 0.2).train()
        x, t = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
        memory(x, t, torch.zeros(4, dtype=torch.int64))
        memory.eval()
        alone = memory(x, t, torch.zeros(4, dtype=torch.int64))
        assert memory.count == 4
        with_others = memory(x, t, torch.ones(4, dtype=torch.int64))
        assert with_others > alone

    def test_without_labels_only_the_image_itself_is_left_out(self):
        memory = Memory(16, 4, 0.2).train()
        x, t = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
        by_number = copy.deepcopy(memory)(x, t, torch.arange(4))
        torch.testing.assert_close(memory(x, t, None), by_number)
        memory(x, t, None)
        assert memory.keys[:8].unique().numel() == 8

    def test_state_goes_on_where_it_was_saved(self):
        method = CRD(negatives=6, width=4)
        method.bind(VECTORS)
        for _ in range(3):
            compared(method, *vectors(4), torch.randint(0, 5, (4,)))
        other = CRD(negatives=6, width=4)
        other.bind(VECTORS)
        other.load_state_dict(method.state_dict())
        student, teacher = vectors(4)
        labels = torch.tensor([0, 1, 2, 3])
        for _ in range(2):
            assert compared(other, student, teacher, labels) == compared(method, student, teacher, labels)

    def test_learning_brings_pairs_together(self):
        method = CRD(negatives=32, width=8)
        method.bind(VECTORS)
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        student = torch.randn(16, 32)
        teacher, labels = student @ torch.randn(32, 40), torch.arange(16)
        for _ in range(60):
            optimizer.zero_grad()
            compared(method, student, teacher, labels).backward()
            optimizer.step()
        s, t = (
            F.normalize(method.embed_student[0](student), dim=1),
            F.normalize(method.embed_teacher[0](teacher), dim=1),
        )
        assert ((s @ t.T).argmax(1) == labels).float().mean() > 0.9


def test_crd_at_a_low_temperature_stays_finite():
    method = CRD(contrast_temperature=0.005)
    student, teacher = vectors(8)
    assert compared(method, student, teacher, torch.arange(8)).isfinite()
    assert method.memories[0].log_scale.isfinite().all()
