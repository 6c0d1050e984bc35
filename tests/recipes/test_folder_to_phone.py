"""From folders to a phone: the recipe in its shortest form, and its errors."""

import sys

import onnxruntime
import pytest
from running import RECIPES, finish, run

from hetkd import load_student


@pytest.mark.slow
def test_the_whole_way_on_embedded_images(tmp_path):
    out = run("folder_to_phone.py", "--epochs", "1", "--student", "timm:test_resnet", cwd=tmp_path)
    for words in ("no problem found", "student alone", "student taught", "ONNX, int8", "by onnxruntime alone: "):
        assert words in out
    folder = tmp_path / "runs" / "folder_to_phone"
    session = onnxruntime.InferenceSession(str(folder / "student-int8.onnx"))
    assert session.get_inputs()[0].shape[1:] == [1, 56, 56]
    answer = load_student(folder / "student" / "best.safetensors").predict(
        folder / "photos" / "val" / "bag" / "000.png"
    )
    assert answer.label in {path.name for path in (folder / "photos" / "train").iterdir()}


@pytest.mark.slow
def test_errors_are_lines_and_no_tracebacks(tmp_path):
    command = [sys.executable, str(RECIPES / "folder_to_phone.py"), "--photos", str(tmp_path), "--teacher", "timm:nope"]
    done = finish(command, 100, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("folder_to_phone.py: ")
    assert "Traceback" not in done.stderr
