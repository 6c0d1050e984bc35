"""The comparison on CIFAR-100 in its shortest form: random images, tiny teachers, two images a class."""

import json

import pytest
import study
import study_report
import study_tables
import torch
from recorded import RecordedViews, view_of

from hetkd import Distiller
from hetkd.models import build_small, save_model

PAIR = "dinov2_s:resnet_slim"
TEACHERS = {"dinov2_s": ("test_vit", 64), "lite0": ("test_efficientnet", 32), "swin": ("swin", 32)}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small data and teachers, recorded; returns the folder."""
    sizes = {"images_a_class": 2, "validation_images_a_class": 1, "views": 2, "batch_size": 32}
    for name, value in {**sizes, "epochs": 2, "warmup_epochs": 1}.items():
        monkeypatch.setitem(study.PROTOCOL, name, value)
    for name, (model, pixels) in TEACHERS.items():
        monkeypatch.setitem(study.TEACHERS, name, model)
        monkeypatch.setitem(study.PIXELS, name, pixels)
        (tmp_path / "teachers").mkdir(exist_ok=True)
        path = tmp_path / "teachers" / f"cifar100-0-{study.PIXELS[name]}px-{model}.safetensors"
        save_model(build_small(model, study.PIXELS[name], study.CLASSES, 3)[0], path)
    labels = torch.arange(study.CLASSES)

    def part(count):
        images = torch.randint(256, (count * study.CLASSES, 3, 32, 32), dtype=torch.uint8)
        return images, labels.repeat_interleave(count)

    split = study.Split(part(2), part(1), part(1))
    for module in (study, study_report):
        monkeypatch.setattr(module, "load_split", lambda: split)
    monkeypatch.setattr(study, "teachers_digest", lambda: "0")
    words = ["record", "--teachers", str(tmp_path / "teachers"), "--recorded", str(tmp_path / "recorded")]
    arguments = study.parse_arguments(words)
    for name in TEACHERS:
        study.record(name, arguments)
    return tmp_path


@pytest.mark.slow
def test_runs_tables_and_pictures(small):
    rows = []
    for pair in (pair for pair in study.PAIRS if pair.split(":")[0] in TEACHERS):
        for method in ("ce", "kd", "fitnet", "uhkd", "sfkd"):
            job = study.Job(pair, *study.parse_method(method), kind="final", epochs=2)
            rows.append(study.train(job, small / "recorded", small / "students"))
    job = study.Job(PAIR, *study.parse_method("sfkd:keep=1,stage_weights=[1,2,3]"), kind="part", epochs=2)
    rows.append(study.train(job, small / "recorded", small / "students"))
    assert rows[-1]["options"] == {"keep": 1, "stage_weights": [1, 2, 3]}
    again = study.train(study.Job(PAIR, "sfkd", kind="final", epochs=2), small / "recorded", small / "students")
    assert again["curve"] == next(row["curve"] for row in rows if row["key"] == again["key"])
    path = study.student_path(small / "students", PAIR, "kd")
    before = path.read_bytes()
    longer = [study.Job(PAIR, method, kind="final", epochs=4) for method in ("ce", "kd")]
    rows += [study.train(job, small / "recorded", small / "students") for job in longer]
    assert path.read_bytes() == before, "the report's pictures are of students of the protocol"
    runs = small / "runs.jsonl"
    runs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {
        "runs": runs,
        "tables": small / "tables.md",
        "output": small,
        "teachers": small / "teachers",
        "students": small / "students",
    }
    study_report.main(["--features", *(word for name, path in folders.items() for word in (f"--{name}", str(path)))])
    text = (small / "tables.md").read_text()
    gain = rows[1]["test"] - rows[0]["test"]
    assert f"| kd | {rows[1]['test']:.2f} (1) {gain:+.2f} |" in text
    assert "sfkd (keep=1, stage_weights=[1, 2, 3])" in text
    gain = rows[-1]["test"] - rows[-2]["test"]
    assert f"| kd | {rows[-1]['test']:.2f} (1) {gain:+.2f} |" in text.partition("test images (4 epochs)")[2]
    for name in ("curves", "cka", "bands"):
        assert (small / f"{name}.png").stat().st_size > 5_000


@pytest.mark.slow
def test_recorded_features_are_those_of_the_teacher_on_the_same_view(small):
    teacher, size = study.load_teacher("dinov2_s", small / "teachers")
    student = build_small("resnet_slim", 64, study.CLASSES, 3)[0]
    distiller = Distiller(teacher, student, "sfkd", input_size={"teacher": size, "student": 64})
    images, index = study.load_split().train[0], torch.tensor([5, 0, 17])
    recorded = RecordedViews(small / "recorded" / "dinov2_s").features(distiller.method.teacher_stages(), 1, index)
    with torch.no_grad():
        live = distiller.taps["teacher"].run(view_of(images, index, 1))
    for ours, theirs in zip((recorded.logits, *recorded.maps), (live.logits, *live.maps), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_a_recording_of_another_teacher_is_not_taken(small):
    path = next((small / "teachers").glob("*-test_vit.safetensors"))
    save_model(build_small("test_vit", 64, study.CLASSES, 3)[0], path)
    folders = ["--teachers", str(small / "teachers"), "--recorded", str(small / "recorded")]
    with pytest.raises(ValueError, match="was recorded with other teacher: delete it"):
        study.record("dinov2_s", study.parse_arguments(["record", *folders]))


@pytest.mark.slow
def test_a_teacher_that_learnt_from_other_images_is_not_taken(small, monkeypatch):
    monkeypatch.setattr(study, "teachers_digest", lambda: "1")
    with pytest.raises(SystemExit, match=r"has cifar100-1-64px-test_vit\.safetensors: train it by"):
        study.load_teacher("dinov2_s", small / "teachers")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lite0", "swin", "mixer", "convnext"])
def test_the_teachers_that_come_with_the_recipe_know_their_classes(name, tmp_path, data_folder, monkeypatch):
    monkeypatch.setenv("HETKD_DATA", str(data_folder))
    teacher, size = study.load_teacher(name, tmp_path)
    images, labels = study.cifar100_split("test")
    part = slice(None, None, 50)
    top1 = Distiller(None, teacher, "ce", input_size=size).evaluate((images[part], labels[part]))["top1"]
    path = next(study.COMMITTED.glob(f"*-{study.PIXELS[name]}px-{study.TEACHERS[name]}.json"))
    assert top1 == pytest.approx(json.loads(path.read_text())["top1"], abs=10)  # 200 images: a standard error of 3.5


def test_scarce_labels_come_in_batches_of_their_own(monkeypatch):
    monkeypatch.setitem(study.PROTOCOL, "images_a_class", 50)
    labels = torch.arange(study.CLASSES).repeat_interleave(50)
    found = list(study.batches(labels, 0.1, True, torch.Generator().manual_seed(0)))
    assert [has_labels for _, has_labels in found] == [True, False] * (len(found) // 2)
    assert all((index % 50 < 5).all() for index, has_labels in found if has_labels)
    assert all(has_labels for _, has_labels in study.batches(labels, 0.1, False, torch.Generator()))


def test_a_view_is_a_shift_and_a_flip():
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 32, 32)
    views = [view_of(images, torch.arange(2), view) for view in range(12)]
    for view in views:
        for image, original in zip(view, images, strict=True):
            padded = torch.nn.functional.pad(original, (4,) * 4)
            cuts = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
            assert any(torch.equal(image, cut) or torch.equal(image, cut.flip(2)) for cut in cuts)
    assert any(not torch.equal(view, views[0]) for view in views[1:])
    assert torch.equal(view_of(images, torch.tensor([1]), 3)[0], views[3][1])


def test_images_are_changed_as_it_says():
    import robustness

    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(robustness.CHANGES["clean"](x), x)
    assert torch.equal(robustness.noise(x, 0.1), robustness.noise(x, 0.1))
    assert (robustness.noise(x, 0.1) - x).std().item() == pytest.approx(0.1, abs=0.03)
    t = 2 * torch.pi * torch.arange(32) / 32
    slow, fast = (0.5 + 0.2 * torch.cos(cycles * t).expand(1, 3, 32, 32) for cycles in (3, 9))
    torch.testing.assert_close(robustness.low_pass(slow, 5), slow)
    torch.testing.assert_close(robustness.low_pass(fast, 5), torch.full_like(fast, 0.5), atol=1e-5, rtol=0)
    assert robustness.blur(fast, 1.0).std() < 0.3 * fast.std()
    assert robustness.blur(slow, 1.0)[..., 8:24].std() > 0.7 * slow[..., 8:24].std()


def test_saved_students_are_tested_on_every_kind_of_images(tmp_path, monkeypatch, capsys):
    import robustness

    images, labels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20)
    monkeypatch.setattr(robustness, "load_split", lambda: study.Split(*[(images, labels)] * 3))
    save_model(build_small("resnet_slim", 32, study.CLASSES, 3)[0], study.student_path(tmp_path, PAIR, "ce"))
    words = ["--pairs", PAIR, "--methods", "ce", "--students", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    robustness.main(words)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["top1"].keys() == robustness.CHANGES.keys()
    assert "low-pass 5" in capsys.readouterr().out


def test_differences_are_paired_by_pair_and_seed():
    def row(method, pair, seed, test):
        return {"method": method, "options": {}, "pair": pair, "seed": seed, "test": test}

    reference = [row("sfkd", "a", 0, 30.0), row("sfkd", "a", 1, 31.0), row("sfkd", "b", 0, 20.0)]
    others = [row("kd", "b", 0, 19.0), row("kd", "a", 1, 28.0), row("kd", "c", 0, 99.0)]
    assert study_tables._against(others, reference, "test") == "-2.00 ± 1.00 (2)"
    assert study_tables._against(reference, reference, "test") == "-"
