"""Every recipe in its shortest form, run as a user runs it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file

RECIPES = REPOSITORY / "recipes"
sys.path.insert(0, str(RECIPES))


def run(recipe: str, *arguments: str, cwd) -> str:
    command = [sys.executable, str(RECIPES / recipe), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=cwd, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path):
    out = run(
        "quickstart.py",
        "--epochs",
        "1",
        "--method",
        "uhkd",
        "--student",
        "test_resnet",
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
    picture = Image.open(tmp_path / "out" / "learning_curves.png")
    assert picture.size == (900, 560)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_bench(tmp_path):
    import bench

    row = bench.bench_tap("timm:test_resnet", 64, torch.device("cpu"), bench.parse_arguments(["--repeats", "2"]))
    assert row["plain_ms"] > 0
    assert 0 < row["ratio"] < 5
    assert row["memory_ratio"] >= 1


def test_coverage(tmp_path):
    page = tmp_path / "coverage.md"
    run("coverage.py", "--only", "[th][of]*:*resnet18*", "--page", str(page), cwd=tmp_path)
    text = page.read_text()
    assert "1 of 1 architectures" in text
    assert "| torchvision | resnet18 | resnet18 | CNN | 64 x 64 | layer1" in text


REFUSED = {"dinat", "dinat backbone", "imagegpt", "perceiver", "shieldgemma2"}  # natten is missing; no spatial features


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_coverage_of_every_architecture():
    spec = importlib.util.spec_from_file_location("coverage_recipe", RECIPES / "coverage.py")  # "coverage" is a package
    coverage = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = coverage
    spec.loader.exec_module(coverage)
    rows = [coverage.check(candidate) for candidate in coverage.candidates("*")]
    assert {row.library for row in rows} == {"timm", "torchvision", "hf"}
    assert len(rows) >= 97 + 80 + 74
    assert {row.name: row.problems for row in rows if row.problems}.keys() <= REFUSED


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
    size = sum(path.stat().st_size for path in fashion.ASSETS.rglob("*") if path.is_file())
    assert size < 8e6


def test_train_teacher(tmp_path, monkeypatch):
    """In its shortest form, with the embedded subset in the place of the whole set."""
    import fashion
    import train_teacher

    monkeypatch.setattr(train_teacher, "whole_set_folder", lambda: fashion.SUBSET)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "teacher.safetensors"
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_teacher.py", "--epochs", "1", "--images", "128", "--output", "out", "--weights", str(weights)],
    )
    train_teacher.main()
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
