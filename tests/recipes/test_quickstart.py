"""The quickstart, and the teacher and images that come with it."""

import sys

import pytest
import torch
from PIL import Image
from running import run
from safetensors.torch import load_file


@pytest.mark.slow
def test_quickstart(tmp_path):
    out = run(
        "quickstart.py",
        "--epochs",
        "1",
        "--method",
        "uhkd",
        "--student",
        "test_resnet",
        "--images",
        "1000",
        "--output",
        "out",
        cwd=tmp_path,
    )
    for words in (
        "method UHKD",
        "alone",
        "KD",
        "SFKD",
        "teacher",
        "loaded again in plain timm",
        "images/s",
        "gain over alone",
    ):
        assert words in out
    student = load_file(tmp_path / "out" / "student.safetensors")
    assert student["fc.weight"].shape[0] == 10
    assert "alone" in (tmp_path / "out" / "report.html").read_text()
    picture = Image.open(tmp_path / "out" / "learning_curves.png")
    assert picture.size == (900, 560)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_embedded_teacher_scores_on_the_embedded_test_images():
    import fashion
    import quickstart

    test = fashion.read_split(fashion.SUBSET, "t10k")
    teacher = fashion.build_teacher(trained=True)
    assert quickstart.evaluate_teacher(teacher, test) > 90


def test_embedded_data_is_a_balanced_subset_and_small():
    import fashion

    for split, per_class in fashion.SUBSET_SIZES.items():
        images, labels = fashion.read_split(fashion.SUBSET, split)
        assert images.shape == (10 * per_class, 1, 28, 28)
        assert torch.equal(labels.bincount(), torch.full((10,), per_class))
    sizes = {path: path.stat().st_size for path in fashion.ASSETS.rglob("*") if path.is_file()}
    teachers = [size for path, size in sizes.items() if path.parent.name == "teachers"]
    assert sum(sizes.values()) - sum(teachers) < 8e6
    assert max(teachers) < 15e6
    assert sum(teachers) < 45e6


@pytest.mark.slow
def test_fashion_teacher(tmp_path, monkeypatch):
    """In its shortest form, with the embedded subset in the place of the whole set."""
    import fashion
    import fashion_teacher

    monkeypatch.setattr(fashion_teacher, "whole_set_folder", lambda: fashion.SUBSET)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "teacher.safetensors"
    monkeypatch.setattr(
        sys,
        "argv",
        ["fashion_teacher.py", "--epochs", "1", "--images", "128", "--output", "out", "--weights", str(weights)],
    )
    fashion_teacher.main()
    state = load_file(weights)
    assert all(value.dtype == torch.float16 for value in state.values())
    assert state.keys() == load_file(fashion.TEACHER).keys()


def test_fashion_writes_the_subset_that_it_reads(tmp_path, monkeypatch, capsys):
    import fashion

    before = fashion.read_split(fashion.SUBSET, "t10k")
    monkeypatch.setattr(fashion, "whole_set_folder", lambda source=fashion.SUBSET: source)
    monkeypatch.setattr(fashion, "SUBSET", tmp_path)
    fashion.write_subset()
    after = fashion.read_split(tmp_path, "t10k")
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert "2000 images" in capsys.readouterr().out
