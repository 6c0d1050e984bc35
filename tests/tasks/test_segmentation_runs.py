"""Segmenters taught, evaluated, stopped, cached, saved and exported."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import tiny_cnn
from PIL import Image
from segmenters import CLASSES, UNet, lraspp, segformer, small, stripes

import hetkd
from hetkd import Distiller, Segmentation, export, list_methods, load_model, load_student

MODELS = {"segformer": segformer, "lraspp": lraspp, "unet": UNet}
QUIET = {"progress": False, "cpu": True, "batch_size": 8}


def make(method="sfkd", teacher=segformer, student=small, **options) -> Distiller:
    torch.manual_seed(0)
    sizes = {"teacher": (64, 64), "student": (40, 56)}
    return Distiller(teacher(), student(), method, input_size=sizes, **options)


@pytest.mark.parametrize(("teacher", "student"), list(itertools.product(MODELS, MODELS)))
def test_every_pair_takes_a_finite_step(teacher, student):
    distiller = make("sfkd", MODELS[teacher], MODELS[student])
    assert distiller.task.name == "segmentation"
    images, masks = stripes(4)
    output = distiller(images, masks)
    output.loss.backward()
    assert {"ce", "kd"} < set(output.terms)
    assert all(torch.isfinite(term) for term in output.terms.values())
    gradients = [p.grad for p in distiller.student.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("method", list_methods("segmentation"))
def test_every_method_takes_a_step(method):
    distiller = make(method)
    distiller(*stripes(4)).loss.backward()


@pytest.mark.parametrize("method", sorted(set(list_methods()) - set(list_methods("segmentation"))))
def test_methods_for_images_alone_are_refused(method):
    with pytest.raises(ValueError, match="is for classification, not for segmentation"):
        make(method)


def test_stages_are_those_of_the_encoder():
    plan = str(make(student=lraspp).plan)
    assert "segformer.stages.0" in plan
    assert "backbone." in plan
    assert "decode_head" not in plan
    assert "classifier" not in plan


def test_a_student_by_name_is_a_segmenter_where_the_teacher_is():
    distiller = Distiller(segformer(), "timm:test_resnet", "kd", input_size=64)
    assert distiller.task.name == "segmentation"
    assert distiller.classes == CLASSES
    assert distiller.predict(torch.rand(1, 3, 64, 64)).ndim == 4


def test_training_learns_and_measures():
    data = stripes(32)
    distiller = Distiller(None, small(), "ce", input_size=(40, 56))
    result = distiller.fit(data, data, epochs=12, lr=0.01, **QUIET)
    assert result.best["miou"] > 80
    assert result.best["pixel_accuracy"] > 85
    assert distiller.evaluate(data)["miou"] == pytest.approx(result.history[-1]["miou"])


def stop_after(distiller, steps):
    original, calls = distiller.method.forward, itertools.count(1)

    def forward(*args):
        if next(calls) > steps:
            raise InterruptedError
        return original(*args)

    distiller.method.forward = forward


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    options = {**QUIET, "epochs": 3, "checkpoint_steps": 1, "ema": 0.9}
    data = stripes(24)
    expected = make()
    expected.fit(data, data, output_dir=tmp_path / "whole", **options)
    stopped = make()
    stop_after(stopped, 4)
    with pytest.raises(InterruptedError):
        stopped.fit(data, data, output_dir=tmp_path / "cut", **options)
    resumed = make()
    resumed.fit(data, data, output_dir=tmp_path / "cut", resume=True, **options)
    for name, x in expected.student.state_dict().items():
        assert torch.equal(x, resumed.student.state_dict()[name]), name


@pytest.fixture
def folder(tmp_path):
    """CamVid's layout: images with PNG masks beside them, of two sizes, and the names of the classes."""
    for split, size in (("train", (48, 64)), ("val", (40, 56))):
        (tmp_path / split).mkdir()
        for number, (image, mask) in enumerate(zip(*stripes(8, size), strict=True)):
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.webp", lossless=True)
            Image.fromarray(mask.to(torch.uint8).numpy()).save(tmp_path / split / f"{number}.png")
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "val" / "odd.webp")
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "val" / "odd.png")
    (tmp_path / "classes.txt").write_text("dark\ngrey\nbright\n")
    return tmp_path


def test_from_folders_to_a_file(folder):
    distiller = make("kd")
    run = folder / "run"
    result = distiller.fit(folder / "train", folder / "val", epochs=1, output_dir=run, **QUIET)
    assert {"miou", "iou/dark"} <= set(result.best)  # masks of two sizes
    assert json.loads((run / "best.json").read_text())["model_args"]["task"] == "segmentation"
    student = load_student(run / "best.safetensors")
    assert student.classes == ["dark", "grey", "bright"]
    found = student.predict(folder / "val" / "odd.webp")
    assert found.mask.shape == (30, 30)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert [one.mask.shape for one in student.predict(torch.rand(2, 3, 20, 30))] == [(20, 30)] * 2


def test_export(folder):
    pytest.importorskip("onnxruntime")
    distiller = Distiller(None, small(), "ce", input_size=(40, 56))
    report = export(distiller, folder / "student.onnx", images=folder / "val")
    assert report.same_top1 == pytest.approx(100)
    assert report.largest_difference < 1e-4
    assert report.top1 is None


def test_a_recorded_teacher(folder):
    distiller = make("uhkd")
    distiller.cache_teacher(folder / "train", folder / "cache", progress=False)
    distiller.fit(folder / "train", folder / "val", epochs=1, teacher_cache=folder / "cache", **QUIET)
    apart = Distiller(f"cache:{folder / 'cache'}", small(), "uhkd", input_size={"student": (40, 56)})
    assert apart.task.name == "segmentation"
    with pytest.raises(ValueError, match="top_k=2 is not for segmentation"):
        distiller.cache_teacher(folder / "train", folder / "other", top_k=2)


def test_the_class_of_a_mask_is_out_of_range(folder):
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(folder / "train" / "3.png")
    with pytest.raises(ValueError, match=r"masks range from \d to 7, but the student has 3 classes"):
        make("kd").fit(folder / "train", epochs=1, **QUIET)
    distiller = make("kd", task=Segmentation(ignore_index=7))
    with pytest.raises(ValueError, match="masks range from 0 to 255"):
        distiller.fit(folder / "train", epochs=1, **QUIET)


def test_tasks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"yields logits for each pixel, the student for the whole image"):
        Distiller(segformer(), tiny_cnn(), "kd", input_size=64)
    with pytest.raises(ValueError, match="the student has no classifier"):
        Distiller(tiny_cnn(), small(), "kd", input_size=64, task="classification")
    with pytest.raises(ValueError, match="did you mean 'segmentation'"):
        Distiller(None, small(), "ce", task="segmentatoin")
    with pytest.raises(ValueError, match="num_classes=11"):
        load_model("timm:test_resnet", pretrained=False, task="segmentation")
    with pytest.raises(ValueError, match=r"mixup=0.2 is not for segmentation"):
        make("kd").fit(stripes(8), epochs=1, mixup=0.2, **QUIET)


def test_features_alone_from_a_classifier():
    distiller = Distiller(tiny_cnn(), small(), "fitnet", input_size=64, kd_weight=0, task="segmentation")
    assert distiller.task.is_dense
    distiller(torch.rand(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.int64)).loss.backward()


def test_a_vit_gets_a_linear_decoder():
    model = load_model("timm:test_vit", pretrained=False, task="segmentation", num_classes=5, img_size=64)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5, 4, 4)
    assert hetkd.Distiller(None, model, "ce", input_size=64).task.is_dense
