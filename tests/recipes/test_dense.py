"""The study on CamVid in its shortest form: random images, on the CPU."""

import json

import dense
import dense_data
import dense_report
import pytest
import torch
from dense_data import Split, Views, band_of, draw_view, random_split


def lines_of(folder):
    return [json.loads(line) for line in (folder / "dense.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_teacher_views_and_students_have_their_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dense_data, "SIZE", (64, 96))
    words = ["--dry", "--random", "--cpu", "--workers", "0", "--output", str(tmp_path)]
    words += ["--students", "mobilenetv3_small_050", "--methods", "ce", "cwd:kd_weight=30.0"]
    dense.main(words)
    rows = lines_of(tmp_path)
    assert [row["step"] for row in rows] == ["teacher", "record", "student", "student"]
    assert all(0 <= row[split]["miou"] <= 100 for row in rows if row["step"] != "record" for split in ("val", "test"))
    assert len(rows[2]["val"]["edges"]) == len(dense_data.EDGES) + 1
    names = sorted(path.name for path in (tmp_path / "students").glob("*.safetensors"))
    assert names == [f"lite0-mobilenetv3_small_050-{method}.safetensors" for method in ("ce", "cwd-kd_weight=30.0")]
    dense.main([*words, "kd"])  # what is done is not done again
    assert [row.get("method") for row in lines_of(tmp_path)[4:]] == [None, "kd"]
    capsys.readouterr()
    dense_report.main([str(tmp_path / "dense.jsonl")])
    found = capsys.readouterr().out
    assert "| cwd (kd_weight=30.0) | 1 |" in found
    assert found.count("teacher lite0") == 1


def test_students_in_processes_are_dealt_out(tmp_path, monkeypatch):
    taken = []
    arguments = dense.parse_arguments(
        ["--dry", "--random", "--cpu", "--output", str(tmp_path), "--methods", "ce", "kd"]
    )
    jobs = dense.all_jobs(arguments)
    assert [(job.method, job.pair.split(":")[1]) for job in jobs[:2]] == [("ce", name) for name in dense.STUDENTS]
    monkeypatch.setattr(dense.Views, "load", lambda file, device: None)
    monkeypatch.setattr(dense, "train_student", lambda study, job: taken.append(job))
    dense.work(arguments, jobs, float("inf"), tmp_path / "views.safetensors")
    assert taken == jobs
    dense.work(arguments, jobs, 0.0, tmp_path / "views.safetensors")
    assert taken == jobs, "the time is over"


def test_bands_are_distances_to_the_next_edge():
    mask = torch.zeros(1, 4, 60, dtype=torch.uint8)
    mask[..., 20:] = 3
    columns = torch.arange(60)
    distance = torch.where(columns < 20, 20 - columns, columns - 19)
    expected = sum((distance > reach).long() for reach in dense_data.EDGES)
    assert torch.equal(band_of(mask)[0, 0], expected)


def test_views_crop_image_and_mask_alike():
    torch.manual_seed(0)
    mask = torch.arange(12).repeat_interleave(10).expand(4, 90, 120).byte()
    images = (20 * mask)[:, None].expand(4, 3, 90, 120)
    view = draw_view(Split(images, mask.contiguous()))
    assert view.images.shape == (4, 3, *dense_data.SIZE)
    assert view.images.dtype == view.masks.dtype == torch.uint8
    for image, classes in zip(view.images.float().mean(1), view.masks, strict=True):
        means = [image[classes == number].mean() for number in classes.unique()]
        assert means == sorted(means), "brighter stripes are higher classes, after the crop too"


def test_views_come_back_from_their_file(tmp_path):
    split = random_split(2)
    views = Views(split.images[None], split.masks[None], {"logits": torch.rand(1, 2, 11, 4, 5).half()})
    views.save(tmp_path / "views.safetensors")
    again = Views.load(tmp_path / "views.safetensors", torch.device("cpu"))
    assert torch.equal(again.images, views.images)
    assert torch.equal(again.features["logits"], views.features["logits"])
