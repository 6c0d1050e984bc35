"""The base of methods: logits, options, one's own."""

import pytest
import torch
import torch.nn.functional as F
from conftest import PAIRS, STUDENT_STAGES, TEACHER_STAGES, features
from spectral_methods import bound
from torch import nn

from hetkd import (
    CE,
    KD,
    SFKD,
    FeatureMethod,
    Features,
    list_methods,
    register_method,
)
from hetkd.methods.common.method import Method, make_method, method_options, methods


def test_kd_equals_the_formula_in_float64():
    student, teacher = features(STUDENT_STAGES), features(TEACHER_STAGES)
    labels = torch.randint(0, 10, (6,))
    method = bound(KD(temperature=3.0, kd_weight=0.7, ce_weight=0.5), [])
    terms = method(student, method.encode(Features(teacher.logits, ())), labels)
    p = (teacher.logits.double() / 3).softmax(1)
    q = (student.logits.double() / 3).softmax(1)
    assert terms["kd"].item() == pytest.approx((0.7 * 9 * (p * (p / q).log()).sum(1).mean()).item(), rel=1e-5)
    chosen = student.logits.double().softmax(1).gather(1, labels[:, None])
    assert terms["ce"].item() == pytest.approx((-0.5 * chosen.log().mean()).item(), rel=1e-5)
    same = method(Features(teacher.logits, ()), method.encode(Features(teacher.logits, ())))
    assert same["kd"].abs() < 1e-6
    assert "ce" not in same


def test_soft_labels_give_soft_cross_entropy():
    student = features(STUDENT_STAGES)
    labels = torch.rand(6, 10).softmax(1)
    terms = bound(CE(), [])(student, {}, labels)
    expected = -(labels * student.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(terms["ce"], expected)
    with pytest.raises(ValueError, match="labels=None"):
        CE()(student, {}, None)


def test_a_method_serves_one_distiller():
    with pytest.raises(RuntimeError, match="serves another Distiller"):
        bound(bound(SFKD()))


def test_own_method_by_name():
    @register_method("test-last-map")
    class LastMap(FeatureMethod):
        """Mean squared error of pooled maps."""

        term = "last"
        automatic_stages = 1

        def __init__(self, *, feature_weight: float = 1.0) -> None:
            super().__init__(
                feature_weight=feature_weight, stage_weights=None, ce_weight=1.0, kd_weight=0.0, temperature=1.0
            )

        def bind(self, pairs):
            super().bind(pairs)
            self.linear = nn.Linear(pairs[0].student.channels, pairs[0].teacher.channels)

        def encode_stage(self, index, x):
            return x.mean((2, 3))

        def compare(self, index, x, target, labels):
            return F.mse_loss(self.linear(x.mean((2, 3))), target)

    try:
        assert "test-last-map" in list_methods()
        method = bound(make_method("test-last-map", {"feature_weight": 2.0}), PAIRS[-1:])
        student, teacher = features(STUDENT_STAGES[1:]), features(TEACHER_STAGES[1:])
        assert set(method(student, method.encode(teacher), torch.zeros(6, dtype=torch.int64))) == {"ce", "last.s2"}
    finally:
        methods._items.pop("test-last-map")


def test_every_option_is_documented():
    for name in list_methods("classification"):
        method_class = methods[name]
        for option in method_options(method_class):
            documented = [base.__doc__ or "" for base in method_class.__mro__ if issubclass(base, Method)]
            assert any(f"{option}:" in text for text in documented), f"{name} does not document {option}"
