"""Reports: figures equal to formulas, one self-contained page, whatever the student."""

import re

import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.report.measure import Answers, band_energies, cka_table, disagreements
from hetkd.training.agreement import linear_cka


def random_answers(count=200, classes=6, seed=0) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return Answers(logits.softmax(1), torch.randint(classes, (count,), generator=generator))


def test_answers_are_measured_as_torchmetrics_does():
    found = random_answers()
    expected = multiclass_calibration_error(found.probabilities, found.labels, 6, n_bins=10)
    assert found.calibration_error == pytest.approx(100 * expected.item(), abs=1e-3)
    assert found.loss == pytest.approx(nn.functional.nll_loss(found.probabilities.log(), found.labels).item())
    of_class = found.of_class(7)
    assert of_class[6] is None
    assert of_class[2] == pytest.approx(100 * found.right[found.labels == 2].double().mean().item())


def test_confusions_are_counted():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    answers = Answers(nn.functional.one_hot(torch.tensor([1, 1, 0, 0, 1, 2]), 3).float(), labels)
    assert answers.confused(5) == [(0, 1, 2), (1, 0, 1)]
    assert Answers(torch.eye(3), torch.arange(3)).confused(5) == []


def test_disagreements_come_with_the_largest_first():
    student = Answers(torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.9, 0.1]]), torch.zeros(3).long())
    teacher = Answers(torch.tensor([[0.0, 1.0], [0.6, 0.4], [0.8, 0.2]]), torch.zeros(3).long())
    assert disagreements(student, teacher, 5) == [0, 1]


def test_stages_are_compared_as_vectors_are():
    x, y = torch.randn(20, 3, 4, 4), torch.randn(20, 5, 2, 2)
    ((value,),) = cka_table({"a": x}, {"b": y})
    assert value == pytest.approx(linear_cka(x.flatten(1), y.flatten(1)), rel=1e-6)


def test_energies_tell_smooth_maps_from_rough_ones():
    smooth = torch.linspace(-1, 1, 8).repeat(2, 1, 8, 1) + torch.linspace(-1, 1, 8)[:, None]
    rough = torch.ones(2, 1, 8, 8)
    rough[..., ::2] = -1
    found = band_energies({"smooth": smooth, "rough": rough})
    assert found["smooth"][0] > 0.7 > 0.1 > found["smooth"][2]
    assert found["rough"][2] == pytest.approx(1)
    assert all(sum(shares) == pytest.approx(1) for shares in found.values())


@pytest.mark.parametrize("classes", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_page_has_everything_and_needs_nothing(tmp_path, classes):
    torch.manual_seed(0)
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % classes
    distiller = Distiller(tiny_vit(num_classes=classes), tiny_cnn(num_classes=classes), "uhkd", input_size=32)
    distiller.class_names = [f"<kind & {number}>" for number in range(classes)]
    with pytest.warns(RuntimeWarning, match="chance"):
        distiller.fit((images, labels), (images, labels), epochs=2, batch_size=16, **QUIET)
    alone = Distiller(None, tiny_cnn(num_classes=classes), "ce", input_size=32)
    modes = [module.training for module in distiller.student.modules()]
    path = distiller.report((images, labels), tmp_path / "pages" / "report.html", baseline=alone)
    assert [module.training for module in distiller.student.modules()] == modes
    page = path.read_text()
    for words in (
        "student alone",
        "Calibration",
        "uhkd.layer1",
        "CKA of the teacher",
        "Where student and teacher disagree",
    ):
        assert words in page, words
    assert page.count('role="img"') >= 7
    assert "&lt;kind &amp; 0&gt;" in page
    assert "<kind & 0>" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page.replace("xlink:href", "href"))
    assert path.stat().st_size < 3_000_000


def test_fit_writes_a_report_if_asked(tmp_path):
    data = bright_or_dark(32)
    distiller = Distiller(None, tiny_cnn(), "ce", input_size=32)
    distiller.fit(data, data, epochs=1, batch_size=16, output_dir=tmp_path, report=True, **QUIET)
    page = (tmp_path / "report.html").read_text()
    assert "32 validation images, 10 classes" in page
    assert "disagree" not in page  # there is no teacher
    with pytest.raises(ValueError, match="report=True needs an output_dir"):
        distiller.fit(data, data, epochs=1, report=True, **QUIET)


def test_loaders_and_other_classes_are_reported_too(tmp_path):
    images, labels = bright_or_dark(24)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=5)
    distiller = Distiller(tiny_vit(num_classes=7), tiny_cnn(), "fitnet", input_size=32)
    page = distiller.report(loader, tmp_path / "report.html").read_text()
    assert "24 validation images" in page
    assert "CKA of the teacher" in page
    assert "disagree" not in page  # the teacher has other classes
    with pytest.raises(ValueError, match="val has images without labels"):
        distiller.report(images, tmp_path / "other.html")
