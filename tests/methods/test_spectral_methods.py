"""What holds for SFKD and UHKD alike."""

import math

import pytest
import torch
from conftest import STUDENT_STAGES, TEACHER_STAGES, features
from spectral_methods import SFKD_OPTIONS, UHKD_OPTIONS, bound

from hetkd import (
    SFKD,
    UHKD,
    Features,
    FitNet,
    Stage,
    StagePair,
)

ALL = [(SFKD, o) for o in SFKD_OPTIONS] + [(UHKD, o) for o in UHKD_OPTIONS]


@pytest.mark.parametrize(("method_class", "options"), ALL)
def test_every_parameter_learns_by_the_second_step(method_class, options):
    method = bound(method_class(**options))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    teacher = features(TEACHER_STAGES)
    alive: set[str] = set()
    for _ in range(2):
        student = features(STUDENT_STAGES, grad=True)
        terms = method(student, method.encode(teacher), torch.randint(0, 10, (6,)))
        assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        assert all(x.grad.abs().sum() > 0 for x in student.maps)
        alive |= {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
        optimizer.step()
    assert alive == {name for name, _ in method.named_parameters()}


@pytest.mark.parametrize(("method_class", "options"), ALL)
def test_encode_has_no_parameters_and_no_gradient_and_works_per_image(method_class, options):
    method = bound(method_class(**options))
    teacher = features(TEACHER_STAGES, size=6, grad=True)
    learnt = {id(p) for p in method.parameters()}
    assert not learnt & {id(p) for part in (method.reduce, method.teacher_view) for p in part.parameters()}
    targets = method.encode(teacher)
    assert not any(target.requires_grad for target in targets.values())
    part = method.encode(Features(teacher.logits[2:4], tuple(x[2:4] for x in teacher.maps)))
    for name, target in targets.items():
        torch.testing.assert_close(part[name], target[2:4])


@pytest.mark.parametrize("method_class", [SFKD, UHKD])
def test_targets_are_compact(method_class):
    method = bound(method_class())
    teacher = features((Stage("t", 768, 14, 14), Stage("u", 768, 7, 7)))
    method = bound(
        method_class(), [StagePair(s, STUDENT_STAGES[1]) for s in (Stage("t", 768, 14, 14), Stage("u", 768, 7, 7))]
    )
    targets = method.encode(teacher)
    assert all(t[0].numel() <= 256 * 5 * 5 for name, t in targets.items() if name != "logits")


@pytest.mark.parametrize(("method_class", "start"), [(SFKD, 0.5), (FitNet, 1.0)])
def test_learnt_weights_start_as_the_others(method_class, start):
    assert bound(method_class(stage_weights="learnt"))._weights == [start, start]


def test_learnt_weights_follow_the_uncertainty():
    method = bound(SFKD(stage_weights="learnt", feature_weight=2.0))
    fixed = bound(SFKD(stage_weights=(0.5, 0.5), feature_weight=2.0))
    fixed.load_state_dict({k: v for k, v in method.state_dict().items() if k != "log_variance"})
    student, teacher = features(STUDENT_STAGES), features(TEACHER_STAGES)
    with torch.no_grad():
        method.log_variance.copy_(torch.tensor([1.0, -1.0]))
    ours, plain = method(student, method.encode(teacher)), fixed(student, fixed.encode(teacher))
    assert ours["sfkd.s1"].item() == pytest.approx(plain["sfkd.s1"].item() * math.exp(-1) + 1.0, rel=1e-5)
    assert ours["sfkd.s2"].item() == pytest.approx(plain["sfkd.s2"].item() * math.exp(1) - 1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method_class", [SFKD, UHKD])
def test_half_precision_features_under_autocast(method_class, dtype):
    method = bound(method_class())
    teacher, student = features(TEACHER_STAGES), features(STUDENT_STAGES)
    half = Features(student.logits.to(dtype), tuple(x.to(dtype) for x in student.maps))
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(half, method.encode(teacher))
    reference = method(student, method.encode(teacher))
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(reference[name].item(), rel=0.03, abs=0.01)
