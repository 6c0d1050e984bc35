"""The recipe that fine-tunes a teacher on one's own pictures."""

import sys

import pytest
import torch
from conftest import tiny_cnn
from PIL import Image
from running import RECIPES, finish

import hetkd
from hetkd.models import save_model


def folder(root, classes=("blue", "red")):
    for split, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                colour = (10 * index, 0, 200) if number == 0 else (200, 0, 10 * index)
                Image.new("RGB", (40, 32), colour).save(root / split / name / f"{index}.png")
    return root


def recipe(*words, cwd):
    return finish([sys.executable, str(RECIPES / "train_teacher.py"), *map(str, words)], 200, cwd=cwd)


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_from_a_file_and_loads_by_its_path(tmp_path):
    torch.manual_seed(0)
    save_model(tiny_cnn(num_classes=7), tmp_path / "w.safetensors")
    data = folder(tmp_path / "photos")
    common = ("--model", "timm:test_resnet", "--weights", "w.safetensors", "--dataset", data, "--pixels", 32)
    done = recipe(*common, "--epochs", 1, "--batch-size", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the new classifier alone: top-1 100.00 %" in done.stdout
    path = tmp_path / "runs" / "teachers" / "test_resnet.safetensors"
    assert hetkd.load_student(path).predict(data / "val" / "red" / "1.png").label == "red"


@pytest.mark.slow
def test_errors_are_lines_and_no_tracebacks(tmp_path):
    done = recipe("--model", "timm:test_resnet", "--dataset", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("train_teacher.py: ")
    assert "needs the folders train/ and val/" in done.stderr
    assert "Traceback" not in done.stderr
