"""The recipe for a lent GPU in its shortest form: random images, on the CPU."""

import json

import gpu
import gpu_cost
import gpu_pack
import gpu_teacher
import pytest
import torch
from gpu_teacher import Recorded, Session, build_student, make_distiller, record, reflected, view_of


def arguments_of(folder, *words):
    shortest = ["--dry", "--cpu", "--random", "--output", str(folder)]
    arguments = gpu.parse_arguments([*shortest, *words])
    arguments.classes = 10
    return arguments


def lines_of(folder):
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_step_writes_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_cost, "STUDENTS", ["resnet_slim"])
    words = ["--dry", "--cpu", "--random", "--output", str(tmp_path), "--students", "resnet_slim", "mobilenetv2"]
    steps = ["--steps", "study", "cost", "rest"]  # compilation takes minutes
    gpu.main([*words, *steps, "--methods", "ce", "sfkd", "kd", "uhkd", "fitnet:stages=[0,1,2]", "rsd"])
    rows = lines_of(tmp_path)
    assert [row["step"] for row in rows if row["step"] in ("failed", "teacher", "record")] == ["teacher", "record"]
    study = [row for row in rows if row["step"] == "study"]
    first = ["ce", "sfkd", "kd", "uhkd", "fitnet"]
    assert [row["method"] for row in study] == [*first, *first, "rsd", "rsd"]
    assert [row["pair"] for row in study[4:6]] == ["lite0:resnet_slim", "lite0:mobilenetv2"]
    assert all(0 <= row["test"] <= 100 and row["epochs_done"] == 1 and row["versions"]["torch"] for row in study)
    cost = [row for row in rows if row["step"] == "cost"]
    assert {(row["precision"], row["method"]) for row in cost} >= {("fp32", "floor"), ("bf16", "sfkd")}
    assert all(row["ratio"] == 1 for row in cost if row["method"] == "floor")
    assert [row["method"] for row in rows if row["step"] == "loop"] == ["kd", "sfkd"]
    assert "done, 0 failures" in capsys.readouterr().out
    gpu.main([*words, "--steps", "study", "--methods", "ce", "--students", "resnet_slim"])
    again = lines_of(tmp_path)[len(rows) :]
    assert again[0]["step"] == "teacher"
    assert again[0]["steps"] == 0, "the teacher that was saved is loaded"


def test_a_run_that_takes_too_long_stops_and_others_go_on(tmp_path):
    arguments = arguments_of(tmp_path, "--students", "resnet_slim", "--methods", "ce", "--epochs", "3")
    session = Session(torch.device("cpu"), 0.0, tmp_path, {})
    labels = torch.arange(32) % 10
    images = torch.randint(256, (2, 32, 3, 32, 32), dtype=torch.uint8)
    study = gpu.Study(session, torch.nn.Identity(), Recorded(images, labels, {}), (images[0], labels), arguments)
    job = gpu.rounds(arguments)[0][0]
    gpu.train_student(study, job)
    row = lines_of(tmp_path)[0]
    assert (row["epochs_done"], row["test"]) == (1, None)
    assert not session.attempt("nothing", lambda: 1 / 0)
    assert lines_of(tmp_path)[1]["error"] == "ZeroDivisionError: division by zero"


def test_recorded_targets_are_those_of_the_teacher_on_the_same_view(tmp_path):
    arguments = arguments_of(tmp_path, "--students", "resnet_slim")
    session = Session(torch.device("cpu"), 60.0, tmp_path, {})
    session.autocast = lambda *_, **__: torch.autocast("cpu", enabled=False)
    teacher = gpu_teacher.build_small("test_efficientnet", 96, 10, 3)[0].eval()
    train, _ = gpu_teacher.load_data(arguments, session.device)
    recorded, index = record(session, teacher, train, arguments), torch.tensor([5, 0, 17])
    for method in ("sfkd", "fitnet", "rsd", "kd"):
        distiller = make_distiller(teacher, build_student("resnet_slim", 10), method)
        live = distiller.teachers.encode(recorded.images[1][index]).targets
        found = recorded.targets(distiller, 1, index)
        assert found.keys() == live.keys()
        for name, x in live.items():
            torch.testing.assert_close(found[name], x, atol=2e-3, rtol=5e-3)


def test_a_view_is_a_shift_reflected_at_the_border_and_a_flip():
    assert reflected(torch.arange(-3, 9), 6).tolist() == [3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2]
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images.float(), (4,) * 4, mode="reflect").to(torch.uint8)
    for view, wide in zip(view_of(images, torch.Generator().manual_seed(0)), padded, strict=True):
        cuts = [wide[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(view, cut) or torch.equal(view, cut.flip(2)) for cut in cuts)


def test_files_are_dealt_out_to_parts_with_room_and_code_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "MOST_IN_A_PART", 100)
    data = {f"{folder}/{n}": 20 + n for folder in ("camvid", "dinov2_vits14") for n in range(5)}
    for name, size in {"wheels/a.whl": 50, "recipes/gpu.py": 10, **data}.items():
        path = tmp_path / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    sizes = gpu_pack.deal(tmp_path / "all", tmp_path / "out", ["camvid", "dinov2_vits14"])
    assert sum(sizes) == 60 + 2 * sum(range(20, 25))
    assert max(sizes) <= 100
    parts = [{path.name for path in part.iterdir()} for part in sorted((tmp_path / "out").iterdir())]
    assert {"wheels", "recipes"} <= parts[0]
    assert "dinov2_vits14" not in parts[0]
    assert "camvid" not in parts[-1]
