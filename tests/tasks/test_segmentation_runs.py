"""Segmenters taught, evaluated, stopped, cached, saved and exported."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import transformers
from conftest import tiny_cnn
from PIL import Image
from segmenters import CLASSES, UNet, lraspp, segformer, small, stripes

import hetkd
from hetkd import Distiller, Segmentation, export, list_methods, load_model, load_student
from hetkd.features.hooks import logits_of_queries

MODELS = {"segformer": segformer, "lraspp": lraspp, "unet": UNet}
QUIET = {"progress": False, "cpu": True, "batch_size": 8}


def make(method="sfkd", teacher=segformer, student=small, **options) -> Distiller:
    torch.manual_seed(0)
    sizes = {"teacher": (64, 64), "student": (40, 56)} | options.pop("input_size", {})
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


def deeplab():
    return torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(("model", "encoder"), [(deeplab, "backbone"), (smp_unet, "encoder")])
def test_resnets_with_a_decoder_teach_and_learn(model, encoder, role):
    distiller = make(**{role: model, "input_size": {role: 64}})
    stages = [stage.name for stage in distiller.taps[role].stages]
    assert {stage.partition(".")[0] for stage in stages} == {encoder}
    assert not any("bn" in stage for stage in stages), "what is overwritten in place is no stage"
    distiller(*stripes(2)).loss.backward()


def test_a_segmenter_of_queries_yields_logits_of_pixels():
    encoder = transformers.SwinConfig(
        image_size=64, depths=[1] * 4, num_heads=[1] * 4, embed_dim=8, window_size=2, out_indices=[1, 2, 3, 4]
    )
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 5,
        "num_attention_heads": 2,
        "num_labels": CLASSES,
    }
    sizes |= dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "dim_feedforward"), 32)
    config = transformers.Mask2FormerConfig(backbone_config=encoder, encoder_feedforward_dim=32, **sizes)
    output = make(teacher=lambda: transformers.Mask2FormerForUniversalSegmentation(config))(*stripes(2))
    assert output.teacher_logits.shape == (2, CLASSES, 16, 16)
    output.loss.backward()


def test_stages_of_eomt_are_blocks_without_queries():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64, "num_queries": 7}
    config = transformers.EomtConfig(**sizes, num_hidden_layers=4, num_blocks=2, num_labels=CLASSES)
    distiller = make(teacher=lambda: transformers.EomtForUniversalSegmentation(config))
    assert [str(stage) for stage in distiller.taps["teacher"].stages] == [f"layers.{n} [16, 4, 4]" for n in (0, 1)]


def test_queries_name_the_class_that_their_library_names():
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(2, 5, CLASSES + 1), masks_queries_logits=torch.randn(2, 5, 384, 384)
    )
    found = logits_of_queries(outputs.class_queries_logits, outputs.masks_queries_logits).argmax(1)
    expected = transformers.Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)
    assert torch.equal(found, torch.stack(expected))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"no classifier that yields logits \[B, classes\], as task='classification'"):
        Distiller(tiny_cnn(), small(), "kd", input_size=64, task="classification")
    with pytest.raises(ValueError, match="'mobilenet_v3_small' classifies images: for segmentation use one of deeplab"):
        Distiller(segformer(), "torchvision:mobilenet_v3_small", "kd", input_size=64)
    with pytest.raises(ValueError, match="did you mean 'segmentation'"):
        Distiller(None, small(), "ce", task="segmentatoin")
    with pytest.raises(ValueError, match="num_classes=11"):
        load_model("timm:test_resnet", pretrained=False, task="segmentation")
    with pytest.raises(ValueError, match=r"mixup=0.2 is not for segmentation"):
        make("kd").fit(stripes(8), epochs=1, mixup=0.2, **QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.softmax(1), "the student yields probabilities, all between 0 and 1, but losses take logits"),
        (lambda y: (y, y), "must return the logits .* of its last convolution, before any softmax and in no tuple"),
    ],
)
def test_segmenters_that_yield_no_logits(change, message):
    class Changed(UNet):
        def forward(self, x):
            return change(super().forward(x))

    for task in (None, "segmentation"):
        with pytest.raises(ValueError, match=message):
            Distiller(segformer(), Changed(), "kd", input_size=64, task=task)


def test_features_alone_from_a_classifier():
    distiller = Distiller(tiny_cnn(), small(), "fitnet", input_size=64, kd_weight=0, task="segmentation")
    assert distiller.task.is_dense
    distiller(torch.rand(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.int64)).loss.backward()


def test_a_vit_gets_a_linear_decoder():
    model = load_model("timm:test_vit", pretrained=False, task="segmentation", num_classes=5, img_size=64)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5, 4, 4)
    assert hetkd.Distiller(None, model, "ce", input_size=64).task.is_dense


def test_learning_without_labels_is_measured_by_agreement():
    images, _ = stripes(16)
    distiller = make("kd", ce_weight=0)
    result = distiller.fit(images, images, epochs=1, **QUIET)
    assert 0 <= result.best["agreement"] <= 100
    features = make("rsd", ce_weight=0)
    assert "agreement" in features.fit(images, stripes(16), epochs=1, **QUIET).best


def test_what_is_for_classifiers_says_so(folder):
    with pytest.raises(ValueError, match="finetune is for classifiers"):
        hetkd.finetune(small(), stripes(8), num_classes=CLASSES, epochs=0, output_dir=folder / "runs", cpu=True)
    with pytest.raises(ValueError, match="report=True is not for segmentation"):
        make("kd").report(stripes(8), folder / "report.html")


def test_the_card_says_what_it_is(folder):
    distiller = make("kd")
    distiller.fit(folder / "train", folder / "val", epochs=1, output_dir=folder / "run", **QUIET)
    card = (folder / "run" / "best.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "| validation mIoU, % |" in card


def test_a_classifier_teaches_a_segmenter_by_its_features():
    distiller = Distiller(tiny_cnn(), UNet(), "rsd", input_size=64)
    assert distiller.task.is_dense
    distiller(torch.rand(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.int64)).loss.backward()


@pytest.mark.slow
def test_several_teachers(folder):
    distiller = Distiller([segformer(), lraspp()], small(), "kd", input_size=(40, 56))
    assert {"teacher0.kd", "teacher1.kd"} <= set(distiller(*stripes(4)).terms)
    distiller.fit(folder / "train", folder / "val", epochs=1, **QUIET)


def test_cwd_beside_other_methods_is_cwd():
    images, masks = stripes(4)
    alone = make("cwd")(images, masks).terms["cwd"]
    together = make(hetkd.Combined(["cwd", "fitnet"]))(images, masks).terms
    assert {"ce", "cwd"} < set(together)
    torch.testing.assert_close(together["cwd"], alone)


def test_masks_follow_the_teachers_classes_by_name(folder):
    teacher = segformer()
    teacher.config.id2label = {0: "bright", 1: "dark", 2: "grey"}
    distiller = Distiller(teacher, small(), "kd", input_size=64)
    distiller.fit(folder / "train", epochs=1, min_crop=1.0, **QUIET)
    assert distiller.class_names == ["bright", "dark", "grey"]
    dataset = distiller.task.make_dataset(
        folder / "train", what="train", spec=distiller.student_inputs.spec, size=(64, 64), train=False
    )
    before = dataset[0][1]
    dataset.order_classes(["bright", "dark", "grey"], "the teacher", "train")
    after = dataset[0][1]
    assert torch.equal(after == 1, before == 0)  # dark
    assert torch.equal(after == 0, before == 2)  # bright
    assert torch.equal(after == 255, before == 255)


def test_tensors_of_a_dataset_pass_as_they_are():
    images, masks = stripes(8, (64, 64))
    normalised = [((image - 0.5) / 0.25, mask) for image, mask in zip(images, masks, strict=True)]
    distiller = Distiller(None, small(), "ce", input_size=64, normalized=((0.5,) * 3, (0.25,) * 3))
    dataset = distiller.task.make_dataset(
        normalised, what="train", spec=distiller.student_inputs.spec, size=(64, 64), train=True, seed=0
    )
    assert torch.equal(dataset[3][0], normalised[3][0])
    distiller.fit(normalised, epochs=1, **QUIET)


def test_a_foreground_of_255_is_said():
    images, masks = stripes(8, (64, 64))
    binary = [(image, torch.where(mask == 2, 255, 0)) for image, mask in zip(images, masks, strict=True)]
    with pytest.warns(RuntimeWarning, match="masks hold the values 0 and 255 alone"):
        Distiller(None, small(), "ce", input_size=64).fit(binary, epochs=1, **QUIET)


def test_few_or_no_pixels_with_a_class():
    images, masks = stripes(8)
    masks[:] = 255
    masks[1, 0, 0] = 1
    distiller = make("kd")
    assert all(torch.isfinite(term) for term in distiller(images, masks).terms.values())
    distiller.fit((images, masks), (images, masks), epochs=1, **{**QUIET, "batch_size": 2})


def test_names_of_classes_are_as_many(folder):
    (folder / "classes.txt").write_text("dark\ngrey\nbright\nvoid\n")
    with pytest.raises(ValueError, match=r"classes.txt has 4 names .*, but the student has 3 classes"):
        make("kd").fit(folder / "train", epochs=1, **QUIET)


def test_check_reads_masks(folder):
    found = make("kd").check(folder / "train", folder / "val")
    assert [each.images for each in found.surveys] == [8, 9]
    assert ["which is chance for 3 classes" in problem for problem in found.problems] in ([], [True])  # untrained


def test_from_a_shell(folder, capsys):
    from hetkd.__main__ import main

    path = folder / "student.safetensors"
    distiller = make("kd")
    distiller.class_names = ["dark", "grey", "bright"]
    distiller.save_student(path)
    assert main(["evaluate", str(path), str(folder / "val")]) == 0
    assert "miou" in capsys.readouterr().out
    assert main(["predict", str(path), str(folder / "val" / "odd.webp")]) == 0
    assert " %" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_segmenter_has_no_idle_parameters(name):
    model = load_model(f"timm:{name}", pretrained=False, task="segmentation", num_classes=3)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_a_backbone_that_yields_its_last_map_keeps_that_stage():
    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = ((3, 8), (8, 16), (16, 24), (24, 32))
            self.blocks = torch.nn.Sequential(
                *(torch.nn.Sequential(torch.nn.Conv2d(*s, 3, 2, 1), torch.nn.ReLU()) for s in sizes)
            )

        def forward(self, x):
            return self.blocks(x)

    distiller = Distiller(Backbone(), tiny_cnn(), "fitnet", input_size=64, kd_weight=0)
    assert distiller.task.name == "classification"
    assert distiller.plan.rows[-1].teacher.startswith("blocks.3")
