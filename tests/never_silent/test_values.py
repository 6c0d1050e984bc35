"""Values of losses and transforms, against the formulas and the authors' code in float64."""

import pytest
import pywt
import torch
import torch.nn.functional as F
from conftest import tiny_cnn, tiny_vit
from torch import Tensor

from hetkd import AT, CRD, KD, Distiller, Features, FitNet, Stage, StagePair
from hetkd.methods.crd import Memory
from hetkd.methods.dist import correlation
from hetkd.methods.rkd import angles, distances
from hetkd.spectral import dwt2, idwt2, list_wavelets


def test_crd_counts_the_positive_pair_once_for_each_side():
    """The authors contrast each side with constants of the other, from their memory."""
    torch.manual_seed(0)
    student, teacher = (F.normalize(torch.randn(6, 4), dim=1).requires_grad_() for _ in range(2))
    memory = Memory(8, 4, 0.5).train()
    memory(student, teacher, torch.arange(6)).backward()
    found = student.grad.clone()

    s = student.detach().clone().requires_grad_()
    t = teacher.detach()
    similarity = s @ t.T / 0.5
    similarity = similarity - (similarity.detach().exp().mean()).log()
    negative = ~torch.eye(6, dtype=torch.bool)
    count = torch.tensor(5.0)
    loss = F.softplus(count.log() - similarity.diagonal()) + (F.softplus(similarity - count.log()) * negative).sum(1)
    loss.mean().backward()
    torch.testing.assert_close(found, s.grad)


def pair(teacher: int, student: int) -> StagePair:
    return StagePair(Stage("t", 8, teacher, teacher), Stage("s", 8, student, student))


@pytest.mark.parametrize("size", [16, 28, 56])
def test_equal_grids_are_compared_as_they_are(size):
    x, y = torch.rand(2, 8, size, size), torch.rand(2, 8, size, size)
    method = AT(ce_weight=0.0, feature_weight=1.0)
    method.bind([pair(size, size)])
    loss = method(Features(None, (x,)), method.encode(Features(None, (y,))))["at.s"]
    attention = [F.normalize(z.double().square().mean(1).flatten(1), dim=1) for z in (x, y)]
    torch.testing.assert_close(loss.double(), (attention[0] - attention[1]).square().mean(), rtol=1e-4, atol=0)
    method = FitNet()
    method.bind([pair(size, size)])
    assert method.encode(Features(None, (y,)))["stage0"].shape[-2:] == (size, size)


def test_unequal_grids_meet_on_the_coarser_one_of_at_most_16_pixels():
    for sizes, expected in (((14, 56), 14), ((32, 56), 16)):
        method = FitNet()
        method.bind([pair(*sizes)])
        assert method.encode(Features(None, (torch.rand(1, 8, sizes[0], sizes[0]),)))["stage0"].shape[-1] == expected


@pytest.mark.parametrize("name", list_wavelets())
def test_every_wavelet_that_is_taken_restores(name):
    x = torch.randn(8, 8, dtype=torch.float64)
    assert (idwt2(dwt2(x, name), name) - x).abs().max() < 1e-6


def test_a_wavelet_that_does_not_restore_is_refused():
    assert pywt.Wavelet("dmey").orthogonal, "by PyWavelets' own word"
    with pytest.raises(ValueError, match="unknown orthogonal wavelet 'dmey'"):
        dwt2(torch.zeros(8, 8), "dmey")


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "deit", "ofa", "ce"])
def test_float64_stays_float64(name):
    student, teacher = tiny_cnn().double(), tiny_vit().double()
    distiller = Distiller(teacher, student, name, input_size=32).double()
    output = distiller(torch.rand(4, 3, 32, 32), torch.arange(4))
    assert all(term.dtype == torch.float64 for term_name, term in output.terms.items() if "." not in term_name)


def test_kd_in_float64_has_its_precision():
    student, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    loss = KD(temperature=2.0).logit_loss(Features(student, ()), teacher, None)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    torch.testing.assert_close(loss, 4 * (p * (p / q).log()).sum(1).mean(), rtol=1e-14, atol=0)


def direct_angles(x: Tensor) -> Tensor:
    x = x.double()
    cosines = torch.zeros(len(x), len(x), len(x), dtype=torch.float64)
    for j in range(len(x)):
        for i in range(len(x)):
            for k in range(len(x)):
                if j not in (i, k):
                    cosines[j, i, k] = F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0, eps=0)
    return cosines


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-6])
def test_angles_and_distances_of_rows_that_nearly_agree(gap):
    x = torch.randn(4, 16)
    x = torch.cat([x, x * (1 + gap)]).requires_grad_()
    torch.testing.assert_close(angles(x).double(), direct_angles(x.detach()), atol=1e-5, rtol=0)
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(x).double(), expected / (expected.sum() / 56), atol=1e-6, rtol=1e-5)
    (angles(x).sum() + distances(x).sum()).backward()
    assert x.grad.isfinite().all()


def test_angles_have_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(angles, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(distances, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_correlation_is_pearsons_along_either_axis(dim):
    x, y = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    rows = (x, y) if dim == 1 else (x.T, y.T)
    expected = torch.stack([torch.corrcoef(torch.stack(both))[0, 1] for both in zip(*rows, strict=True)])
    torch.testing.assert_close(correlation(x, y, dim), expected)
    assert correlation(torch.ones(2, 5), torch.rand(2, 5)).abs().max() == 0


def test_stage_weights_that_weigh_more_than_the_default_are_said_in_the_plan():
    plans = [
        str(Distiller(tiny_vit(), tiny_cnn(), "sfkd", input_size=32, stage_weights=weights).plan)
        for weights in (None, "learnt", [0.5, 0.25, 0.25], [1, 1, 1])
    ]
    assert not any("stage_weights" in plan for plan in plans[:3])
    assert "stage_weights sum to 3, by default to 1: sfkd's terms weigh 3 times as much." in plans[3]


def test_crd_takes_options_of_stages_too():
    assert CRD(stage_weights=[1.0]).stage_weights == [1.0]
