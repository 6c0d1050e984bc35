"""Progress without labels, and without a classifier."""

import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.training.agreement import linear_cka, neighbours_accuracy, same_class


def learns_features(**options) -> Distiller:
    torch.manual_seed(0)
    return Distiller(tiny_vit(), tiny_cnn(), "fitnet", ce_weight=0, kd_weight=0, input_size=32, **options)


def test_cka_equals_its_definition_by_gram_matrices():
    x, y = torch.randn(30, 5).double(), torch.randn(30, 7).double()
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(expected.item())
    assert linear_cka(x, x @ torch.linalg.qr(torch.randn(5, 5).double())[0] * 4 + 3) == pytest.approx(1)


def test_neighbours_judge_each_image_by_the_others():
    centres = 5 * torch.eye(3)
    labels = torch.arange(60) % 3
    x = centres[labels] + 0.1 * torch.randn(60, 3)
    assert neighbours_accuracy(x, labels) == 1
    assert neighbours_accuracy(x, torch.randint(3, (60,))) < 0.6
    assert neighbours_accuracy(torch.randn(2, 3), torch.tensor([0, 1])) == 0  # each has the other alone


def test_images_alone_show_progress(tmp_path, capsys):
    images, _ = bright_or_dark(48)
    distiller = learns_features()
    result = distiller.fit(images, images, epochs=3, batch_size=16, cpu=True, output_dir=tmp_path)
    assert all(set(record) >= {"agreement", "train/fitnet"} or "agreement" in record for record in result.history)
    assert result.best["agreement"] == max(record["agreement"] for record in result.history)
    assert (tmp_path / "best.safetensors").exists()
    assert "agreement with the teacher" in capsys.readouterr().out
    with torch.no_grad():
        distiller.eval()
        student = distiller.student_tap.run(images).pooled
        teacher = distiller.taps["teacher"].run(images).pooled
    assert distiller.evaluate(images)["agreement"] == pytest.approx(100 * linear_cka(student, teacher), rel=1e-4)


def test_a_small_labelled_set_adds_nearest_neighbours():
    data = bright_or_dark(48)
    distiller = learns_features()
    result = distiller.fit(data[0], data, epochs=1, batch_size=16, **QUIET)
    assert set(result.history[0]) >= {"agreement", "knn"}
    assert "top1" not in result.history[0]
    assert result.best["knn"] == result.history[0]["knn"]


def test_logits_agree_where_they_are_compared():
    images, labels = bright_or_dark(32)
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", ce_weight=0, input_size=32)
    result = distiller.fit(images, images, epochs=1, batch_size=16, **QUIET)
    with torch.no_grad():
        own, theirs = distiller.predict(images), distiller.taps["teacher"].run(images).logits
    assert result.history[0]["agreement"] == pytest.approx(100 * same_class(own, theirs))
    assert "top1" in distiller.evaluate((images, labels))  # labels tell the accuracy


def test_flat_folders_teach_and_are_measured(tmp_path):
    for index in range(12):
        Image.new("RGB", (32, 32), (20 * index, 100, 0)).save(tmp_path / f"{index}.png")
    result = learns_features().fit(tmp_path, tmp_path, epochs=1, batch_size=4, **QUIET)
    assert 0 <= result.history[0]["agreement"] <= 100


def test_labels_that_are_needed_are_missed():
    images, _ = bright_or_dark(16)
    with pytest.raises(ValueError, match="val has images without labels"):
        Distiller(None, tiny_cnn(), "ce", input_size=32).evaluate(images)
    with pytest.raises(ValueError, match="neither labels nor a teacher"):
        Distiller(None, tiny_cnn(), "ce", ce_weight=0, input_size=32).evaluate(images)


def test_patience_counts_agreement_too():
    images, _ = bright_or_dark(16)
    options = {"epochs": 9, "patience": 1, "batch_size": 8, "lr": 1e-12, "min_lr": 0.0}
    result = learns_features().fit(images, images, **options, **QUIET)
    assert len(result.history) < 9


def test_images_of_all_classes_are_looked_at(monkeypatch):
    from hetkd.training import agreement, evaluate

    monkeypatch.setattr(agreement, "MOST_IMAGES", 10)
    monkeypatch.setattr(evaluate, "MOST_IMAGES", 10)
    seen = []
    monkeypatch.setattr(agreement, "neighbours_accuracy", lambda x, labels: seen.append(labels) or 0.5)
    images, _ = bright_or_dark(40)
    learns_features().evaluate((images, torch.arange(40) // 8))  # sorted by class, as folders are
    assert set(seen[0].tolist()) == set(range(5))


def test_teachers_see_the_images_at_their_own_size(tmp_path):
    for index in range(6):
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / f"{index}.png")
    distiller = Distiller(
        tiny_vit(img_size=64), tiny_cnn(), "fitnet", ce_weight=0, kd_weight=0, input_size={"teacher": 64, "student": 32}
    )
    seen = []
    run = distiller.taps["teacher"].prepare
    distiller.taps["teacher"].prepare = lambda images: seen.append(images.shape[-1]) or run(images)
    distiller.evaluate(tmp_path)
    assert seen == [64]


def test_nothing_to_agree_with_is_said_before_any_training(tmp_path):
    images, _ = bright_or_dark(16)
    learns_features(stages=[0]).cache_teacher(images, tmp_path / "cache", progress=False)
    options = {"ce_weight": 0, "kd_weight": 0, "stages": [0], "input_size": 32}
    alone = Distiller(f"cache:{tmp_path / 'cache'}", tiny_cnn(), "fitnet", **options)
    before = {name: x.clone() for name, x in alone.student.state_dict().items()}
    with pytest.raises(ValueError, match="neither labels nor a teacher"):
        alone.fit(images, images, epochs=1, batch_size=8, **QUIET)
    assert all(torch.equal(x, before[name]) for name, x in alone.student.state_dict().items())
