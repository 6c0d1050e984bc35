"""Losses against independent computations, and the properties that the methods promise."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import PAIRS, STUDENT_STAGES, TEACHER_STAGES, features
from torch import nn

from hetkd import (
    CE,
    KD,
    SFKD,
    UHKD,
    FeatureMethod,
    Features,
    FitNet,
    Method,
    Stage,
    StagePair,
    list_methods,
    register_method,
)
from hetkd.methods.common.method import make_method, method_options, methods
from hetkd.methods.common.statistics import (
    ChannelReduction,
    correlation_losses,
    infonce,
    squared_errors,
    standardize_batch,
    standardize_sample,
    weights_side_by_side,
)
from hetkd.methods.sfkd.ds2s import DS2S, DepthwiseKernel, LiteDS2S
from hetkd.methods.uhkd import spectrum_per_pixel
from hetkd.spectral import dwt2, idwt2, low_frequencies

SFKD_OPTIONS = [
    {},
    {"ds2s": "lite"},
    {"ds2s": None},
    {"levels": 0},
    {"levels": 1, "wavelet": "db2"},
    {"levels": 2, "streams": "spatial"},
    {"streams": "spectral", "refinement_stages": 1},
    {"refinement_stages": 0},
    {"loss": "mse"},
    {"loss": "mse", "normalize": "sample"},
    {"loss": "infonce"},
    {"loss": "infonce", "normalize": "sample"},
    {"sigma": 0.0},
    {"sigma": math.inf, "keep": 3},
    {"spectrum": "amplitude"},
    {"normalize": "sample"},
    {"normalize": "sample", "spectrum": "amplitude"},
    {"decorrelation": 0.01},
    {"stage_weights": "learnt"},
    {"stage_weights": (0.5, 2.0)},
    {"width": 8},
    {"width": 8, "reduction": "pca"},
]
UHKD_OPTIONS = [
    {},
    {"spectrum": "amplitude"},
    {"spectrum": "amplitude", "compression": "log"},
    {"compression": "power"},
    {"normalize": "sample", "keep": 3},
    {"stage_weights": "learnt", "width": 8, "reduction": "pca"},
]
ALL = [(SFKD, o) for o in SFKD_OPTIONS] + [(UHKD, o) for o in UHKD_OPTIONS]


def bound(method: Method, pairs=PAIRS) -> Method:
    method.bind(pairs)
    return method


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


def same_pairs() -> list[StagePair]:
    return [StagePair(stage, stage) for stage in (Stage("a", 16, 8, 8), Stage("b", 32, 7, 7))]


@pytest.mark.parametrize(
    "options", [o for o in SFKD_OPTIONS if o.get("loss") != "infonce" and "decorrelation" not in o and "width" not in o]
)
def test_sfkd_is_zero_where_features_are_equal(options):
    method = bound(SFKD(**options), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    feature_terms = {k: v for k, v in method(x, method.encode(x)).items() if k.startswith("sfkd")}
    assert len(feature_terms) == 2
    assert all(term.abs() < 1e-4 for term in feature_terms.values())


@pytest.mark.parametrize("grids", [((14, 14), (7, 7)), ((7, 7), (14, 14)), ((28, 28), (14, 7))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ds2s": "lite", "wavelet": "db2"},
        {"ds2s": "lite"},
        {"levels": 1},
        {"levels": 0},
        {"ds2s": None, "levels": 2},
    ],
)
def test_sfkd_by_matrices_equals_its_steps_one_by_one(grids, options):
    teacher, student = grids
    pair = StagePair(Stage("t", 24, *teacher), Stage("s", 12, *student))
    method = bound(SFKD(**options), [pair])
    for parameter in method.parameters():  # away from the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, y = torch.randn(4, 12, *student), torch.randn(4, 24, *teacher)
    keep, grid = method._keeps[0], method._grids[0]
    expected = low_frequencies(method.refined_features([x])[0], keep, half=True)
    torch.testing.assert_close(method.refined_spectra([x])[0], expected, atol=1e-5, rtol=1e-4)
    resampled = F.interpolate(y, grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(method.encode_stage(0, y), low_frequencies(resampled, keep, half=True))
    projected = F.interpolate(F.conv2d(x, method.project[0].weight), grid, mode="bilinear", antialias=True)
    refine = method.shared[0].refine
    if refine is not None:
        projected = idwt2(refine(dwt2(projected, method.wavelet, method._levels[0])), method.wavelet)
    torch.testing.assert_close(method.refined_features([x])[0], projected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", UHKD_OPTIONS)
def test_uhkd_mixes_coefficients_as_it_would_mix_pixels(options):
    pair = StagePair(Stage("t", 24, 14, 14), Stage("s", 12, 7, 8))
    align, x = bound(UHKD(**options), [pair]).align[0], torch.randn(4, 12, 7, 8)
    pixels = align.mix(align.layers(x))
    keep = align.gain.shape[1]
    expected = align.compress(spectrum_per_pixel(pixels, keep)) * (1 + align.gain) + align.bias
    torch.testing.assert_close(align(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grid", "pixels"), [(14, (14, 12)), (6, (6, 6)), (3, (5, 5))])
def test_uhkd_resamples_a_map_of_many_pixels_first(grid, pixels):
    pair = StagePair(Stage("t", 24, 14, 14), Stage("s", 12, 14, 12))
    align, x = bound(UHKD(grid=grid), [pair]).align[0], torch.randn(4, 12, 14, 12)
    resampled = F.interpolate(x, pixels, mode="bilinear", antialias=True)
    expected = spectrum_per_pixel(align.mix(align.layers(resampled)), 5) * (1 + align.gain) + align.bias
    torch.testing.assert_close(align(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", UHKD_OPTIONS[:5])
def test_uhkd_is_zero_where_aligned_features_are_equal(options):
    method = bound(UHKD(**options), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    targets = method.encode(x)
    standardized = {"batch": lambda t: standardize_batch(t, is_complex=method.spectrum == "complex")}
    make = standardized.get(method.normalize, standardize_sample)
    for index in range(2):
        aligned = make(targets[f"stage{index}"])
        method.align[index].forward = lambda _, aligned=aligned: aligned
    terms = method(x, targets)
    assert terms["uhkd.a"] < 1e-6
    assert terms["uhkd.b"] < 1e-6


@pytest.mark.parametrize("method_class", [SFKD, UHKD])
@pytest.mark.parametrize("spectrum", ["amplitude", "complex"])
def test_only_amplitude_ignores_circular_shifts_of_the_teacher(method_class, spectrum):
    method = bound(method_class(spectrum=spectrum), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()))
    shifted = Features(x.logits, tuple(m.roll((3, 2), dims=(2, 3)) for m in x.maps))
    # On the second pair, sfkd resamples 7 x 7 to 8 x 8, where a shift is none of whole pixels.
    a, b = method.encode(x)["stage0"], method.encode(shifted)["stage0"]
    assert torch.allclose(a, b, atol=1e-4) == (spectrum == "amplitude")


@pytest.mark.parametrize(("method_class", "options"), ALL)
def test_encode_has_no_parameters_and_no_gradient_and_works_per_image(method_class, options):
    method = bound(method_class(**options))
    teacher = features(TEACHER_STAGES, size=6, grad=True)
    learnt = {id(p) for p in method.parameters()}
    assert not learnt & {id(p) for p in method.reduce.parameters()}
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
    assert all(t[0].numel() <= 256 * 5 * 3 * 2 for name, t in targets.items() if name != "logits")


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [DS2S, LiteDS2S])
def test_refinement_starts_as_the_identity_and_then_changes_every_band(levels, kind):
    refine = kind([4, 2], (16, 8), levels)
    x = torch.randn(3, 6, 16, 8)
    bands = dwt2(x, "haar", levels)
    for ours, theirs in zip(refine(bands).details, bands.details, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(idwt2(refine(bands)), x)
    for parameter in refine.parameters():
        nn.init.normal_(parameter, std=0.3)
    refined = refine(bands)
    for ours, theirs in zip([refined.low, *refined.details], [bands.low, *bands.details], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean() > 0.01


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("kind", [DS2S, LiteDS2S])
def test_maps_are_refined_together_as_one_by_one(kind, levels):
    together, maps = kind([4, 2], (8, 8), levels), (torch.randn(3, 4, 8, 8), torch.randn(3, 2, 8, 8))
    for parameter in together.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = idwt2(together(dwt2(torch.cat(maps, dim=1), "haar", levels))).split([4, 2], dim=1)
    for index, (x, refined) in enumerate(zip(maps, found, strict=True)):
        alone = kind([x.shape[1]], (8, 8), levels)
        state = {}
        for name, value in together.state_dict().items():
            own = re.search(r"(balances|reduce|expand)\.(\d)", name)
            if own is None:
                state[name] = value.split([4, 2])[index]
            elif own[2] == str(index):
                state[name.replace(own[0], f"{own[1]}.0")] = value
        alone.load_state_dict(state)
        torch.testing.assert_close(idwt2(alone(dwt2(x, "haar", levels))), refined, atol=1e-5, rtol=1e-4)
        assert together.parameters_of(index) == sum(p.numel() for p in alone.parameters())


def test_low_and_high_frequencies_exchange_information():
    refine = DS2S([4], (8, 8), 2)
    for parameter in refine.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 8, 8)
    low_only = dwt2(F.interpolate(x.mean((2, 3), keepdim=True), (8, 8)), "haar", 2)
    assert all(detail.abs().max() < 1e-5 for detail in low_only.details)
    assert all(detail.abs().max() > 0.01 for detail in refine(low_only).details)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (1, 3)])
def test_kernels_are_depthwise_convolutions(size):
    kernel, x = DepthwiseKernel(5, 3, size), torch.randn(2, 5, 3, *size)
    weight = nn.init.normal_(kernel.weight).flatten(0, 1).unsqueeze(1)
    expected = F.conv2d(x.flatten(1, 2), weight, padding=1, groups=15).view_as(x)
    torch.testing.assert_close(kernel(x), expected)


def test_lite_has_a_fraction_of_the_parameters():
    full, lite = (sum(p.numel() for p in kind([256], (8, 8), 2).parameters()) for kind in (DS2S, LiteDS2S))
    assert lite < full / 2


def test_spectral_gate_equals_a_gate_on_the_fft():
    refine = DS2S([3], (8, 6), 0, streams="spectral", stages=1)
    gate = nn.init.normal_(refine.gates["0"].gate)
    x = torch.randn(2, 3, 8, 6)
    rows, columns = torch.tensor([0, 1, 2, 3, 4, 3, 2, 1]), torch.arange(4)
    full = gate[:, 0][:, rows][..., columns]
    expected = x + torch.fft.irfft2(torch.fft.rfft2(x) * full, s=(8, 6))
    torch.testing.assert_close(refine(dwt2(x, "haar", 0)).low, expected, atol=1e-5, rtol=1e-4)


def correlation_loss(student, target, weight, **options):
    """Compares one stage ``[B, D, *K]``, weighted by ``[*K]``."""
    weights = weights_side_by_side([weight], [student.shape[1]])
    return correlation_losses([student], [target], weights, **options)[0]


def test_correlation_loss_of_real_coefficients_equals_numpy():
    student, target = torch.randn(20, 3, 2, dtype=torch.float64), torch.randn(20, 3, 2, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.25], dtype=torch.float64)
    rho = torch.stack(
        [
            torch.stack([torch.corrcoef(torch.stack([student[:, d, k], target[:, d, k]]))[0, 1] for k in range(2)])
            for d in range(3)
        ]
    )
    expected = ((1 - rho) ** 2 * weight).sum() / (3 * weight.sum())
    torch.testing.assert_close(correlation_loss(student, target, weight), expected)


def test_correlation_loss_at_zero_frequency_is_the_diagonal_of_rsd():
    student, target = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    s = (student - student.mean(0)) / student.std(0, unbiased=False)
    t = (target - target.mean(0)) / target.std(0, unbiased=False)
    cross = s.T @ t / 32
    on = (torch.diagonal(cross) - 1).square().mean()
    off = (cross.square().sum() - torch.diagonal(cross).square().sum()) / 5
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(correlation_loss(student, target, one), on)
    torch.testing.assert_close(correlation_loss(student, target, one, decorrelation=0.01), on + 0.01 * off)


def test_correlation_loss_ignores_scale_shift_and_constant_targets():
    target = torch.randn(16, 4, 3, 2)
    student = 3 * target + 5
    weight = torch.ones(3)
    assert correlation_loss(student, target, weight, is_complex=True) < 1e-6
    target[:, 2] = 7.0
    assert correlation_loss(student, target, weight, is_complex=True) < 1e-6
    assert correlation_loss(-student, target, weight, is_complex=True) == pytest.approx(4.0, abs=1e-4)


@pytest.mark.parametrize("is_complex", [True, False])
def test_all_stages_at_once_are_compared_as_one_by_one(is_complex):
    end = (2,) if is_complex else ()
    students, targets = ([torch.randn(6, d, k, 3, *end) for d, k in ((4, 5), (7, 2), (3, 1))] for _ in range(2))
    weights = [torch.rand(k, 3) for k in (5, 2, 1)]
    joint = weights_side_by_side(weights, [4, 7, 3])
    options = {"is_complex": is_complex, "decorrelation": 0.1}
    for loss, *one in zip(
        correlation_losses(students, targets, joint, **options), students, targets, weights, strict=True
    ):
        torch.testing.assert_close(loss, correlation_loss(*one, **options))
    found = squared_errors(students, targets, joint, is_complex=is_complex, standardize=True)
    for loss, student, target, weight in zip(found, students, targets, weights, strict=True):
        error = (student - standardize_batch(target, is_complex=is_complex)).square()
        weight = weight.view(*weight.shape, *(1 for _ in end)).expand_as(error)
        torch.testing.assert_close(loss, (error * weight).sum() / weight.sum())


def test_a_batch_of_one_has_no_statistics():
    with pytest.raises(ValueError, match="batch of one image"):
        standardize_batch(torch.ones(1, 3))


def test_infonce_is_the_log_of_the_batch_where_nothing_is_learnt():
    constant = torch.ones(8, 3)
    assert infonce(constant, constant).item() == pytest.approx(math.log(8))
    distinct = torch.eye(8)
    assert infonce(distinct, distinct) < 0.01


@pytest.mark.parametrize("kind", ["orthogonal", "pca"])
def test_channel_reduction_is_orthonormal_and_fixed(kind):
    reduce = ChannelReduction(24, 8, kind)
    x = torch.randn(16, 24, 5, 5) @ torch.randn(5, 5)
    first = reduce(x)
    assert first.shape == (16, 8, 5, 5)
    torch.testing.assert_close(reduce.basis.T @ reduce.basis, torch.eye(8), atol=1e-5, rtol=1e-5)
    other = torch.randn(4, 24, 5, 5)
    torch.testing.assert_close(reduce(other), torch.einsum("bchw,cd->bdhw", other, reduce.basis))
    restored = ChannelReduction(24, 8, kind)
    restored.load_state_dict(reduce.state_dict())
    torch.testing.assert_close(restored(x), first)


def test_pca_keeps_the_most_variance():
    x = torch.randn(64, 24, 3, 3) * torch.linspace(0.1, 3, 24)[:, None, None]
    pca, orthogonal = ChannelReduction(24, 8, "pca")(x), ChannelReduction(24, 8)(x)
    flat = x.transpose(0, 1).flatten(1).double()
    top = torch.linalg.eigvalsh(torch.cov(flat, correction=0)).flip(0)[:8].sum()
    variance = pca.double().transpose(0, 1).flatten(1).var(1, unbiased=False).sum()
    torch.testing.assert_close(variance, top, atol=1e-3, rtol=1e-4)
    assert variance > orthogonal.transpose(0, 1).flatten(1).var(1).sum()


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


def test_stages_share_the_weight():
    assert bound(SFKD())._weights == [0.5, 0.5]
    assert bound(FitNet())._weights == [1.0, 1.0]


@pytest.mark.parametrize(("method_class", "start"), [(SFKD, 0.5), (FitNet, 1.0)])
def test_learnt_weights_start_as_the_others(method_class, start):
    assert bound(method_class(stage_weights="learnt"))._weights == [start, start]


@pytest.mark.parametrize(("grid", "expected"), [(1, "1 x 1, 0 levels"), (4, "4 x 4, 1 level"), (6, "8 x 8, 2 levels")])
def test_the_grid_bounds_the_levels(grid, expected):
    pair = StagePair(Stage("t", 8, 16, 16), Stage("s", 8, 16, 16))
    assert bound(SFKD(grid=grid), [pair]).describe(0).startswith(expected)


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
    for name in list_methods():
        method_class = methods[name]
        for option in method_options(method_class):
            assert f"{option}:" in method_class.__doc__, f"{name} does not document {option}"
