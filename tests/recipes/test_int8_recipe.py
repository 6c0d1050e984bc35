"""What int8 costs, in its shortest form."""

import json

import int8
import pytest

from hetkd.data import ImageData


@pytest.mark.slow
def test_a_line_a_student(tmp_path, monkeypatch):
    whole = int8.load_data("fashion", 28)
    few = ImageData(whole.name, whole.first(50).train, tuple(x[:40] for x in whole.test), whole.classes)
    monkeypatch.setattr(int8, "load_data", lambda name, pixels: few)
    words = ["--students", "mobilenetv3_small_050", "--seeds", "1", "--epochs", "1", "--images", "50"]
    int8.main([*words, "--output", str(tmp_path / "int8.jsonl")])
    (row,) = [json.loads(line) for line in (tmp_path / "int8.jsonl").read_text().splitlines()]
    found = [row[f"{when}{kind}"] for when in ("", "after float ", "after int8 ") for kind in ("float", "int8 file")]
    assert all(0 <= top1 <= 100 for top1 in found)
