"""The comparison of methods."""

import json
import os

import pytest
from PIL import Image
from running import tiny_data
from safetensors.torch import load_file, save_file

from hetkd import RSD
from hetkd.training import TrainingDiverged
from hetkd.training.saving import Saver

COMPARE = (
    "--methods",
    "ce",
    "rsd",
    "kd+at",
    "--pairs",
    "convnext:test_resnet",
    "--epochs",
    "2",
    "--seeds",
    "2",
    "--teacher-epochs",
    "1",
    "--batch-size",
    "16",
)


def compare_tiny(monkeypatch, folder, *words):
    import compare

    monkeypatch.setattr(compare, "load_data", lambda name, pixels: tiny_data(name))
    compare.main([*COMPARE, *words, "--output", str(folder)])
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_compare_writes_rows_table_and_picture_and_refuses_another_protocol(tmp_path, monkeypatch):
    rows = compare_tiny(monkeypatch, tmp_path)
    assert len(rows) == 6
    for key in (
        "dataset",
        "pair",
        "method",
        "seed",
        "top1",
        "epochs",
        "seconds",
        "peak_memory_mb",
        "added_parameters",
        "settings",
        "versions",
        "git_revision",
        "curve",
        "machine",
    ):
        assert all(key in row for row in rows)
    assert all(0 <= row["top1"] <= 100 and row["peak_memory_mb"] > 10 and len(row["curve"]) == 2 for row in rows)
    table = (tmp_path / "table.md").read_text()
    gains = [rows[index]["top1"] - rows[index - 1]["top1"] for index in (1, 4)]
    assert f"| rsd | 2 | {(rows[1]['top1'] + rows[4]['top1']) / 2:.2f} |" in table
    assert f"| {sum(gains) / 2:+.2f} |" in table
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.size[0] > 300
    assert "3 methods on" in (tmp_path / "report.html").read_text()
    before = (tmp_path / "results.jsonl").read_text()
    compare_tiny(monkeypatch, tmp_path)  # nothing is left to do
    assert (tmp_path / "results.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="batch_size 16, now 8"):
        compare_tiny(monkeypatch, tmp_path, "--batch-size", "8")
    assert len(compare_tiny(monkeypatch, tmp_path, "--seeds", "3", "--budget", "0")) == 6
    weights = next((tmp_path / "teachers").glob("*.safetensors"))
    save_file({name: x + 1 for name, x in load_file(weights).items()}, weights)
    with pytest.raises(SystemExit, match="another teacher 'convnext'"):
        compare_tiny(monkeypatch, tmp_path)


@pytest.mark.slow
def test_compare_goes_on_after_a_method_that_diverges(tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise TrainingDiverged("the loss term 'rsd.pooled' is nan")

    monkeypatch.setattr(RSD, "compare_vectors", broken)
    rows = compare_tiny(monkeypatch, tmp_path)
    assert [row["method"] for row in rows] == ["ce", "kd+at"] * 2
    assert "`rsd`: the loss term 'rsd.pooled' is nan" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_compare_killed_in_the_middle_gives_the_same_table(tmp_path, monkeypatch):
    whole = compare_tiny(monkeypatch, tmp_path / "whole")
    epochs = 0

    def power_cut(self, *arguments, real=Saver.save_epoch):
        nonlocal epochs
        epochs += 1
        real(self, *arguments)
        if epochs in (2, 5, 8):  # in the teacher's run, between two epochs of a student, after a student's last
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save_epoch", power_cut)
    cuts = 0
    while True:
        try:
            rows = compare_tiny(monkeypatch, tmp_path / "cut")
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts == 3
    for key in ("pair", "method", "seed", "top1", "curve", "added_parameters"):
        assert [row[key] for row in rows] == [row[key] for row in whole]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "vit"], "is not TEACHER:STUDENT"),
        (["--methods", "kd+rds"], "'rds' is none of"),
        (["--seeds", "0"], "must be at least 1"),
        (["--pairs", "vit:resnet_18"], "resnet18"),
        (["--methods", "all", "kd+kd"], "KD more than once"),
        (["--optimizer", "adamv"], "'adamw'"),
        (["--dataset", "fashon"], "no folder"),
    ],
)
def test_compare_refuses_bad_arguments(words, message, capsys):
    import compare

    with pytest.raises(SystemExit) as error:
        compare.main([*words, "--output", "nowhere"])
    assert message in capsys.readouterr().err + str(error.value)
    assert not os.path.exists("nowhere")
