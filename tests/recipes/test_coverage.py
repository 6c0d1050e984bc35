"""The coverage of all architectures."""

import importlib.util
import sys

import pytest
from running import RECIPES, run


@pytest.mark.slow
def test_coverage(tmp_path):
    page = tmp_path / "coverage.md"
    run("research/coverage.py", "--only", "[th][of]*:*resnet18*", "--page", str(page), cwd=tmp_path)
    text = page.read_text()
    assert "1 of 1 architectures" in text
    assert "| torchvision | resnet18 | resnet18 | CNN | 64 x 64 | layer1" in text


REFUSED = {"dinat", "dinat backbone", "imagegpt", "perceiver", "shieldgemma2"}  # natten is missing; no spatial features


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_coverage_of_every_architecture():
    spec = importlib.util.spec_from_file_location(
        "coverage_recipe", RECIPES / "research" / "coverage.py"
    )  # "coverage" is a package
    coverage = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = coverage
    spec.loader.exec_module(coverage)
    rows = [coverage.check(candidate) for candidate in coverage.candidates("*")]
    assert {row.library for row in rows} == {"timm", "torchvision", "hf"}
    assert len(rows) >= 97 + 80 + 74
    assert {row.name: row.problems for row in rows if row.problems}.keys() <= REFUSED
