"""``python -m hetkd``: the way from folders to names, and errors in one line."""

import subprocess
import sys

import pytest
from PIL import Image

from hetkd import Distiller, load_model, load_student
from hetkd.__main__ import main


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two classes of pictures and a saved teacher in the current folder."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for name, colour in (("dark", (20, 20, 20)), ("light", (230, 230, 230))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), colour).save(tmp_path / split / name / f"{index}.png")
    model = load_model("timm:test_vit", pretrained=False, num_classes=2, img_size=32)
    Distiller(None, model, "ce").save_student("teacher.safetensors")
    return tmp_path


def test_from_folders_to_names(world, capsys):
    words = ["--epochs", "1", "--batch-size", "4", "--no-progress", "--cpu", "--lr", "1e-3", "--input-size", "32"]
    words += ["--method", "sfkd", "--kd-weight", "0", "--sigma", "0.4"]
    assert main(["distil", "teacher.safetensors", "test_resnet", "train", "val", *words]) == 0
    out = capsys.readouterr().out
    assert "method SFKD" in out
    student = world / "runs" / "test_resnet" / "best.safetensors"
    assert student.exists()
    assert main(["evaluate", str(student), "val", "--batch-size", "2"]) == 0
    both = capsys.readouterr().out
    assert "top-1" in both
    (world / "half" / "light").mkdir(parents=True)  # the second class: alone it would be the first
    (world / "val" / "light" / "0.png").rename(world / "half" / "light" / "0.png")
    answer = load_student(student).predict(world / "half" / "light" / "0.png").label
    assert main(["evaluate", str(student), "half"]) == 0
    assert f"top-1 {100.0 if answer == 'light' else 0.0:.2f} %" in capsys.readouterr().out
    (world / "half" / "light" / "0.png").rename(world / "val" / "light" / "0.png")
    assert main(["predict", str(student), "val/dark/0.png", "val/light", "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all("dark" in line or "light" in line for line in lines)
    pytest.importorskip("onnxruntime")
    assert main(["export", str(student), "student.onnx", "--images", "val"]) == 0
    assert "student.onnx" in capsys.readouterr().out
    assert main(["models", "timm:test_resnet*"]) == 0
    assert capsys.readouterr().out == "timm:test_resnet\n"


def test_from_a_model_of_other_classes_to_a_checked_teacher(world, capsys):
    model = load_model("timm:test_vit", pretrained=False, num_classes=5, img_size=32)
    Distiller(None, model, "ce").save_student("other.safetensors")
    words = ["--epochs", "0", "--batch-size", "4", "--cpu", "--no-progress"]
    assert main(["finetune", "other.safetensors", "train", "val", *words]) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out
    teacher = "runs/teachers/test_vit.safetensors"
    assert main(["check", teacher, "test_resnet", "train", "val", "--method", "kd"]) == 0
    out = capsys.readouterr().out
    assert "the teacher is right on 100.0 %" in out
    assert "no problem found" in out
    (world / "train" / "dark" / "0.png").write_bytes(b"no picture")
    assert main(["check", teacher, "test_resnet", "train", "val", "--method", "kd"]) == 1
    assert "PROBLEM: 1 images of train cannot be read" in capsys.readouterr().out
    assert main(["bench", teacher, "--batch-size", "2"]) == 0
    assert "images/s in batches of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "none.safetensors", "x.png"], "none.safetensors does not exist"),
        (["export", "teacher.safetensors", "student"], "must end in .onnx or .pt2"),
        (["distil", "teacher.safetensors", "resnte18", "train", "--epochs", "1"], "unknown timm model 'resnte18'"),
        (["distil", "teacher.safetensors", "test_resnet", "nowhere", "--epochs", "1"], "is no folder"),
        (["distil", "teacher.safetensors", "test_resnet", "train", "--epochs", "0"], "epochs=0"),
        (["models", "timm:zzz*"], "unknown model"),
    ],
)
def test_errors_are_one_line(world, capsys, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_flags_are_the_options_of_the_functions(capsys):
    for method in ("kd", "uhkd"):
        with pytest.raises(SystemExit):
            main(["distil", "--method", method, "--help"])
        text = capsys.readouterr().out
        assert ("--expansion" in text) == (method == "uhkd")
        assert "--checkpoint-minutes" in text
    with pytest.raises(SystemExit):
        main(["distil", "a", "b", "c", "--epochs", "1", "--sgima", "3"])
    assert "unrecognized arguments: --sgima" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_as_a_module():
    found = subprocess.run([sys.executable, "-m", "hetkd", "--help"], capture_output=True, text=True, check=True)
    assert "distil" in found.stdout
