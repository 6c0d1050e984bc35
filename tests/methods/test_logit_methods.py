"""DKD, DIST and DeiT against the formulas of their papers."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import batch, tiny_cnn
from formulas import softmax

from hetkd import (
    DIST,
    DKD,
    KD,
    DeiT,
    Distiller,
    Features,
)
from hetkd.methods.dkd import decoupled_parts


def logits_only(logits: torch.Tensor) -> Features:
    return Features(logits, ())


class TestDKD:
    student, teacher = torch.randn(5, 7), 2 * torch.randn(5, 7)
    labels = torch.tensor([0, 3, 6, 3, 1])

    def test_parts_equal_the_paper_in_float64(self):
        s, t = softmax(self.student.double().numpy()), softmax(self.teacher.double().numpy())
        target, others = decoupled_parts(self.student.double(), self.teacher.double(), self.labels)
        for row, y in enumerate(self.labels.tolist()):
            binary = t[row, y] * math.log(t[row, y] / s[row, y]) + (1 - t[row, y]) * math.log(
                (1 - t[row, y]) / (1 - s[row, y])
            )
            t_hat, s_hat = np.delete(t[row], y) / (1 - t[row, y]), np.delete(s[row], y) / (1 - s[row, y])
            assert target[row].item() == pytest.approx(binary, rel=1e-9)
            assert others[row].item() == pytest.approx((t_hat * np.log(t_hat / s_hat)).sum(), rel=1e-9)

    def test_parts_add_up_to_kd(self):
        target, others = decoupled_parts(self.student, self.teacher, self.labels)
        confidence = self.teacher.softmax(1)[range(5), self.labels]
        kd = KD().logit_loss(logits_only(self.student), self.teacher, None)
        torch.testing.assert_close((target + (1 - confidence) * others).mean(), kd)

    def test_is_zero_for_equal_logits_and_weighs_its_parts(self):
        equal = DKD().logit_loss(logits_only(self.teacher), self.teacher, self.labels)
        assert equal.item() == pytest.approx(0, abs=1e-6)
        target, others = decoupled_parts(self.student / 2, self.teacher / 2, self.labels)
        loss = DKD(alpha=0.5, beta=8, temperature=2).logit_loss(logits_only(self.student), self.teacher, self.labels)
        torch.testing.assert_close(loss, 4 * (0.5 * target.mean() + 8 * others.mean()))

    def test_without_labels_the_teachers_class_stands_in(self):
        student = logits_only(self.student)
        by_teacher = DKD().logit_loss(student, self.teacher, self.teacher.argmax(1))
        torch.testing.assert_close(DKD().logit_loss(student, self.teacher, None), by_teacher)
        soft = F.one_hot(self.labels, 7) * 0.9 + 0.1 / 7
        by_labels = DKD().logit_loss(student, self.teacher, self.labels)
        torch.testing.assert_close(DKD().logit_loss(student, self.teacher, soft), by_labels)

    def test_extreme_logits_stay_finite(self):
        sure = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
        loss = DKD().logit_loss(logits_only(sure), -sure.detach(), torch.tensor([0]))
        loss.backward()
        assert loss.isfinite()
        assert sure.grad.isfinite().all()


class TestDIST:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)

    def test_equals_numpy_in_float64(self):
        s, t = softmax(self.student.double().numpy() / 2), softmax(self.teacher.double().numpy() / 2)
        inter = np.mean([1 - np.corrcoef(s[row], t[row])[0, 1] for row in range(6)])
        intra = np.mean([1 - np.corrcoef(s[:, column], t[:, column])[0, 1] for column in range(5)])
        method = DIST(beta=2.0, gamma=3.0, temperature=2.0)
        loss = method.logit_loss(logits_only(self.student.double()), self.teacher.double(), None)
        assert loss.item() == pytest.approx(4 * (2 * inter + 3 * intra), rel=1e-5)

    def test_by_logits_it_is_invariant_to_scale_and_shift_of_the_students(self):
        method = DIST(scores="logits")
        loss = method.logit_loss(logits_only(self.student), self.teacher, None)
        moved = method.logit_loss(logits_only(7 * self.student - 3), self.teacher, None)
        torch.testing.assert_close(moved, loss)
        assert method.logit_loss(logits_only(5 * self.teacher + 1), self.teacher, None).abs() < 1e-6

    def test_by_probabilities_it_is_invariant_to_shift(self):
        loss = DIST().logit_loss(logits_only(self.student), self.teacher, None)
        torch.testing.assert_close(DIST().logit_loss(logits_only(self.student + 4), self.teacher, None), loss)
        assert DIST().logit_loss(logits_only(self.teacher), self.teacher, None).abs() < 1e-6


class TestDeiT:
    def test_is_half_labels_and_half_the_teachers_decisions(self):
        student, teacher, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1, 0, 5, 2])
        method = DeiT()
        method.bind([])
        terms = method(logits_only(student), {"logits": teacher}, labels)
        assert terms["ce"].item() == pytest.approx(0.5 * F.cross_entropy(student, labels).item())
        assert terms["hard"].item() == pytest.approx(0.5 * F.cross_entropy(student, teacher.argmax(1)).item())

    def test_hugging_face_student_with_a_distillation_token(self):
        from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

        config = DeiTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=10,
        )
        student = DeiTForImageClassificationWithTeacher(config)
        distiller = Distiller(tiny_cnn(), student, "deit", input_size=32).train()
        images, labels = batch()
        terms = distiller(images, labels).terms
        output = student(distiller.student_inputs(images))
        expected = 0.5 * F.cross_entropy(output.cls_logits, labels)
        torch.testing.assert_close(terms["ce"], expected)
        terms["hard"].backward()
        assert student.cls_classifier.weight.grad is None

    def test_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(self):
        student = timm.create_model(
            "deit_tiny_distilled_patch16_224",
            num_classes=10,
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
        )
        distiller = Distiller(tiny_cnn(), student, "deit", input_size=32)
        images, labels = batch()
        output = distiller(images, labels)
        output.terms["hard"].backward()
        assert student.head_dist.weight.grad.abs().sum() > 0
        assert student.head.weight.grad is None
        distiller(images, labels).terms["ce"].backward()
        assert student.head.weight.grad.abs().sum() > 0
        assert not student.distilled_training  # as it was
        student.eval()
        inputs = distiller.student_inputs(images)
        torch.testing.assert_close(distiller.predict(images), student(inputs))
