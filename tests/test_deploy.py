"""Exported students answer as they do in PyTorch, by the other runtime alone."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image

from hetkd import Distiller, export, load_model, load_student

onnxruntime = pytest.importorskip("onnxruntime")
NAMES = ["ash", "birch", "cedar", "elm"]


def student_file(tmp_path, model, size=64):
    distiller = Distiller(None, model, "ce", input_size=size)
    distiller.class_names = NAMES
    distiller.save_student(tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


def cnn(**options):
    torch.manual_seed(0)
    return load_model("timm:test_resnet", pretrained=False, num_classes=4, **options)


def hugging_face():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(cnn, id="cnn"),
        pytest.param(lambda: cnn(in_chans=1), id="grey", marks=pytest.mark.slow),
        pytest.param(
            lambda: load_model("timm:test_vit", pretrained=False, num_classes=4, img_size=64),
            id="vit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_onnx_answers_as_pytorch_with_any_number_of_images(tmp_path, make):
    path = student_file(tmp_path, make())
    report = export(path, tmp_path / "student.onnx")
    assert report.largest_difference < 1e-4
    assert report.top1 is None
    assert "ms an image" in str(report)
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == NAMES
    assert json.loads(metadata["hetkd"])["size"] == [64, 64]
    student = load_student(path)
    for count in (1, 3, 5):
        images = torch.randint(256, (count, student._spec.channels, 64, 64), dtype=torch.uint8)
        (theirs,) = session.run(None, {"images": images.numpy()})
        ours = student.distillation.predict(images).detach().softmax(1)
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    left = [f"student.{ending}" for ending in ("json", "md", "onnx", "safetensors")]
    assert sorted(file.name for file in tmp_path.iterdir()) == left


@pytest.mark.slow
def test_a_hugging_face_student_and_a_distiller_are_exported(tmp_path):
    report = export(student_file(tmp_path, hugging_face()), tmp_path / "new" / "hf.onnx")
    assert report.largest_difference < 1e-4
    distiller = Distiller(tiny_vit(num_classes=4), tiny_cnn(num_classes=4), "kd", input_size=32)
    assert export(distiller, tmp_path / "of_distiller.onnx").largest_difference < 1e-4


def test_pt2_answers_as_pytorch(tmp_path):
    path = student_file(tmp_path, cnn())
    assert export(path, tmp_path / "student.pt2").largest_difference < 1e-5
    files = {"hetkd.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=files)
    assert json.loads(json.loads(files["hetkd.json"])["classes"]) == NAMES
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = load_student(path).distillation.predict(images).detach().softmax(1)
    torch.testing.assert_close(program.module()(images), expected, atol=1e-5, rtol=1e-4)


def test_without_preprocessing_it_takes_normalised_floats(tmp_path):
    path = student_file(tmp_path, cnn())
    export(path, tmp_path / "student.onnx", preprocess=False)
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    distillation = load_student(path).distillation
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    (theirs,) = session.run(None, {"images": distillation.student_inputs(images).numpy()})
    np.testing.assert_allclose(theirs, distillation.predict(images).detach().softmax(1), atol=1e-4)


@pytest.mark.slow
def test_int8_is_calibrated_and_its_accuracy_reported(tmp_path):
    for number, name in enumerate(NAMES):
        for index in range(4):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            colour = tuple(int(60 * number + 10 * index + shift) % 256 for shift in (0, 80, 160))
            Image.new("RGB", (90, 70), colour).save(tmp_path / "photos" / name / f"{index}.png")
    model = cnn()
    path = student_file(tmp_path, model)
    plain = export(path, tmp_path / "student.onnx", images=tmp_path / "photos")
    report = export(path, tmp_path / "student8.onnx", images=tmp_path / "photos", int8=True)
    assert report.images == 16
    assert report.megabytes < 0.6 * plain.megabytes
    expected = Distiller(None, load_student(path).model, "ce", input_size=64).evaluate(tmp_path / "photos")["top1"]
    assert report.top1[0] == pytest.approx(expected, abs=7)
    assert report.largest_difference < 0.2
    graph = onnxruntime.InferenceSession(tmp_path / "student8.onnx")
    assert json.loads(graph.get_modelmeta().custom_metadata_map["classes"]) == NAMES


@pytest.mark.slow
def test_classes_of_the_images_are_the_students(tmp_path):
    for name in ("elm", "birch"):  # without the first and the third: alone they would be 0 and 1
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (70, 70), (40 * index, 90, 10)).save(tmp_path / "photos" / name / f"{index}.png")
    path = student_file(tmp_path, cnn())
    report = export(path, tmp_path / "student.pt2", images=tmp_path / "photos")
    student = load_student(path)
    right = [student.predict(photo).label == photo.parent.name for photo in (tmp_path / "photos").rglob("*.png")]
    assert report.top1[0] == pytest.approx(100 * sum(right) / 6, abs=1e-6)
    assert export(path, tmp_path / "student.pt2", images=tmp_path / "photos", most_images=4).images == 4
    (tmp_path / "photos" / "elm").rename(tmp_path / "photos" / "oak")
    with pytest.raises(ValueError, match="oak"):
        export(path, tmp_path / "student.pt2", images=tmp_path / "photos")


def test_what_cannot_be_exported_is_refused_before_time_is_spent(tmp_path):
    path = student_file(tmp_path, cnn())
    with pytest.raises(ValueError, match=r"must end in \.onnx or \.pt2"):
        export(path, tmp_path / "student")
    with pytest.raises(ValueError, match="needs pictures to calibrate on"):
        export(path, tmp_path / "student.onnx", int8=True)
    with pytest.raises(ValueError, match=r"int8=True is for ONNX"):
        export(path, tmp_path / "student.pt2", int8=True, images=torch.rand(4, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export(tmp_path / "none.safetensors", tmp_path / "student.onnx")
    with pytest.raises(TypeError, match="must be a Student, its path or a Distiller"):
        export(torch.nn.Linear(2, 2), tmp_path / "student.onnx")
    assert not (tmp_path / "student.onnx").exists()


def test_a_graph_that_answers_otherwise_is_not_left(tmp_path, monkeypatch):
    import hetkd.deploy as module

    path = student_file(tmp_path, cnn())
    monkeypatch.setattr(module, "onnx_runner", lambda draft: lambda images: torch.full((len(images), 4), 0.9))
    with pytest.raises(RuntimeError, match="answers differently from PyTorch"):
        export(path, tmp_path / "student.onnx")
    assert not (tmp_path / "student.onnx").exists()
