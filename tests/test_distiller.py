"""The public face: pairs of real models, the frozen teacher, inputs, saving."""

import copy
import itertools
import json

import pytest
import timm
import torch
import torchvision.models
from conftest import batch, tiny_cnn, tiny_vit
from safetensors import safe_open
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForImageClassification, BitImageProcessor, ViTImageProcessor
from transformers_models import HUGGING_FACE, OwnCNN, hugging_face

import hetkd
from hetkd import SFKD, Distiller, load_model
from hetkd.features.hooks import find_classifier
from hetkd.models.inputs import InputTransform, input_spec
from hetkd.utils.compiling import blocks, compile_parts

NAMES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "convnext_atto",
    "resnet18",
    "mobilenetv2_100",
]
METHODS = ["kd", "uhkd", "sfkd"]
# Each model once as teacher and once as student, always of another architecture.
ROUND = list(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))


def check_step(distiller: Distiller, images, labels, terms_at_least: int) -> None:
    output = distiller(images, labels)
    assert len(output.terms) >= terms_at_least
    for name, term in output.terms.items():
        assert term.isfinite(), name
        assert term.abs() > 0, name
    torch.testing.assert_close(output.loss, sum(output.terms.values()))
    output.loss.backward()
    learning = [p for p in distiller.student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    # timm starts the head of mixers at zero, so that logits alone teach only the head in the first step.
    assert learning
    if distiller.method.pairs:
        assert learning[0] is next(p for p in distiller.student.parameters() if p.requires_grad)
    assert all(p.grad is None for p in distiller.teacher.parameters())


def pair_steps(teacher: str, student: str, sizes) -> None:
    teacher_model = load_model(teacher, pretrained=False)
    torch.nn.init.normal_(find_classifier(teacher_model).weight)  # timm starts some heads at zero, which teach nothing
    for method, size in itertools.product(METHODS, sizes):
        torch.manual_seed(0)
        distiller = Distiller(teacher_model, student, method)
        check_step(distiller, *batch(2, size, 1000), terms_at_least=2 if method == "kd" else 4)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), ROUND)
def test_pairs_of_timm_models(teacher, student):
    pair_steps(teacher, student, [224])


@pytest.mark.sweep
@pytest.mark.parametrize(("teacher", "student"), list(itertools.product(NAMES, NAMES)))
def test_all_pairs_of_timm_models(teacher, student):
    pair_steps(teacher, student, [224, 160])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pixels", [96, 65])
def test_student_at_another_size(method, pixels):
    distiller = Distiller(tiny_vit(), "resnet18", method, input_size=pixels)
    check_step(distiller, *batch(4, 40), terms_at_least=2)
    assert distiller.student_inputs(batch(1, 40)[0]).shape[-2:] == (pixels, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_hugging_face_and_torchvision_members(method):
    teacher = hugging_face("vit", HUGGING_FACE[0][1])
    student = torchvision.models.mobilenet_v2(num_classes=5)
    check_step(Distiller(teacher, student, method, input_size=64), *batch(4, 48, 5), terms_at_least=2)
    swin = torchvision.models.swin_t(num_classes=5)
    check_step(Distiller(swin, hugging_face("resnet", HUGGING_FACE[7][1]), method), *batch(2, 48, 5), terms_at_least=2)


def distiller(method="sfkd", **kwargs) -> Distiller:
    return Distiller(tiny_vit(), tiny_cnn(), method, input_size=64, **kwargs)


def test_teacher_is_frozen_and_no_part_of_the_training():
    d = distiller()
    d.train()
    assert not d.teacher.training
    assert not any(p.requires_grad for p in d.teacher.parameters())
    assert not {id(p) for p in d.teacher.parameters()} & {id(p) for p in d.parameters()}
    assert {key.split(".")[0] for key in d.state_dict()} == {"student", "method"}
    before = copy.deepcopy(d.teacher.state_dict())
    optimizer = torch.optim.AdamW(d.parameters(), lr=1e-2)
    d(*batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in d.teacher.state_dict().items())


def test_every_student_parameter_upstream_of_a_stage_learns_without_labels():
    d = Distiller(tiny_vit(), tiny_cnn(zero_init_last=False), "sfkd", input_size=64, kd_weight=0.0)
    d(batch()[0]).loss.backward()
    dead = [name for name, p in d.student.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert [name for name in dead if not name.startswith("fc.")] == []


def test_labels_may_be_none():
    d = distiller()
    output = d(batch()[0])
    assert "ce" not in output.terms
    assert set(output.terms) == {"kd", *(f"sfkd.layer{stage}" for stage in range(1, 4))}
    assert output.student_logits.shape == output.teacher_logits.shape == (8, 10)


def test_teacher_moves_and_keeps_its_dtype():
    teacher = tiny_vit().to(torch.bfloat16)
    d = Distiller(teacher, tiny_cnn(), "sfkd", input_size=64)
    d.to(torch.float64)
    assert next(d.teacher.parameters()).dtype == torch.bfloat16
    assert next(d.student.parameters()).dtype == torch.float64
    d.float()
    assert d(*batch()).loss.isfinite()
    d.to("meta")  # the teacher stays where it is: a distiller on "meta" cannot run
    assert next(d.teacher.parameters()).device.type == "cpu"


def test_teacher_is_not_run_by_ce():
    d = Distiller(None, tiny_cnn(), "ce")
    assert d.teacher is None
    assert "no teacher" in str(d.plan)
    assert set(d(*batch()).terms) == {"ce"}
    assert Distiller(tiny_vit(), tiny_cnn(), "ce").teacher is None


def test_each_model_gets_its_own_input():
    seen = {}
    teacher, student = tiny_vit(), timm.create_model("resnet10t", num_classes=10)
    teacher.patch_embed.register_forward_pre_hook(lambda m, a: seen.update(teacher=a[0]))
    student.conv1[0].register_forward_pre_hook(lambda m, a: seen.update(student=a[0]))
    d = Distiller(teacher, student, "kd", input_size=48)
    images = torch.rand(2, 3, 40, 40)
    d(images)
    assert seen["teacher"].shape[-2:] == (32, 32)
    assert seen["student"].shape[-2:] == (48, 48)
    # ViT's own mean and standard deviation are 0.5, the ResNet's are ImageNet's
    assert seen["teacher"].mean().item() == pytest.approx((images.mean().item() - 0.5) / 0.5, abs=0.05)
    assert seen["student"].mean().item() == pytest.approx((images.mean().item() - 0.449) / 0.226, abs=0.1)


def test_uint8_and_normalized_images_mean_the_same():
    spec = input_spec(tiny_cnn())
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    scaled = raw.float() / 255
    normalized = (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain = InputTransform(spec, (32, 32))
    torch.testing.assert_close(plain(raw), plain(scaled))
    torch.testing.assert_close(InputTransform(spec, (32, 32), (mean, std))(normalized), plain(scaled))
    with pytest.raises(ValueError, match="2 values for images of 3 channels"):
        InputTransform(spec, (32, 32), ((0.1, 0.2), (0.4, 0.5)))


def test_input_specs_of_the_libraries():
    assert input_spec(tiny_vit()).size == (32, 32)
    assert input_spec(tiny_vit(in_chans=1)).mean == (0.5,)
    assert input_spec(torchvision.models.resnet18(weights=None)).mean == (0.485, 0.456, 0.406)
    assert input_spec(torchvision.models.vit_b_32(weights=None)).size == (224, 224)
    vit, dinov2 = hugging_face("vit", HUGGING_FACE[0][1]), hugging_face("dinov2", HUGGING_FACE[3][1])
    assert (input_spec(vit).mean, input_spec(vit).size) == ((0.5, 0.5, 0.5), (64, 64))
    assert input_spec(dinov2).mean == tuple(BitImageProcessor().image_mean) != (0.5, 0.5, 0.5)
    assert input_spec(nn.Linear(2, 2)).channels == 3


def test_stages_by_row_name_and_pair():
    rows = distiller(stages=[0, -1]).plan.rows
    assert [(r.stage, r.student) for r in rows] == [("0", "layer1"), ("3", "layer4"), ("logits", "")]
    assert [r.stage for r in distiller().plan.rows] == ["0", "1", "2", "logits"]
    assert [r.stage for r in distiller(kd_weight=0.0).plan.rows] == ["0", "1", "2", "3"]
    assert distiller(stages=["layer2"]).plan.rows[0].teacher == "blocks.1"
    rows = distiller(stages=[("blocks.3", "layer2"), ("blocks.3", "layer4")]).plan.rows
    assert [(r.teacher, r.student) for r in rows[:2]] == [("blocks.3", "layer2"), ("blocks.3", "layer4")]
    d = distiller(stages=[("blocks.3", "layer4"), ("blocks.0", "layer1")])
    assert d(*batch()).loss.isfinite()
    assert d.method.pairs[0].teacher.name == "blocks.3"


def test_plan_counts_what_is_added():
    d = distiller()
    text = str(d.plan)
    assert "blocks.2" in text
    assert "layer3" in text
    assert "4 x 4, 4 x 4 frequencies" in text
    assert "4 x 4, DS2S on 1 level, 4 x 4 frequencies" in str(distiller(ds2s="full").plan)
    assert d.plan.added_parameters == sum(p.numel() for p in d.method.parameters())
    assert sum(row.added_parameters for row in d.plan.rows) == d.plan.added_parameters
    assert "uhkd" in Distiller(tiny_vit(), tiny_cnn(), "uhkd").plan.title.lower()


def test_method_object():
    d = Distiller(tiny_vit(), tiny_cnn(), SFKD(sigma=0.3), input_size=64)
    assert d.method.sigma == 0.3


def test_same_architecture_with_equal_weights_has_no_loss_but_labels():
    teacher = tiny_cnn().eval()
    student = copy.deepcopy(teacher).eval()
    d = Distiller(teacher, student, "sfkd", input_size={"teacher": 64, "student": 64})
    d.eval()
    output = d(batch()[0])
    assert output.loss.abs() < 1e-3


def test_student_string_gets_the_teachers_classes():
    d = Distiller(tiny_vit(num_classes=7), "timm:test_resnet", "kd")
    assert d.classes == 7
    assert Distiller(None, "test_resnet", "ce", num_classes=3).classes == 3
    assert Distiller(tiny_vit(num_classes=7), "test_resnet", "ce").classes == 7


def test_two_pairs_on_one_student_stage_are_two_terms():
    d = distiller(stages=[("blocks.2", "layer4"), ("blocks.3", "layer4"), ("blocks.3", "layer3")])
    output = d(batch()[0])
    assert set(output.terms) == {"kd", "sfkd.blocks.2-layer4", "sfkd.blocks.3-layer4", "sfkd.layer3"}


def test_training_images_are_loaded_large_enough_for_both():
    assert Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=(24, 64)).loading_size == (32, 64)
    assert Distiller(tiny_vit(), tiny_cnn(), "ce", input_size=24).loading_size == (24, 24)


def test_label_free_student_without_a_classifier_trains():
    d = Distiller(tiny_vit(), tiny_cnn(num_classes=0), "sfkd", input_size=64, ce_weight=0.0, kd_weight=0.0)
    result = d.fit((batch()[0], torch.zeros(8, dtype=torch.int64)), epochs=1, batch_size=4, progress=False, cpu=True)
    assert set(result.history[0]) >= {"train/sfkd.layer3", "train/sfkd.layer4"}


def test_half_precision_distiller_steps_and_predicts():
    d = distiller().bfloat16()
    assert d(*batch()).loss.isfinite()
    assert next(d.method.parameters()).dtype == torch.float32
    assert d.eval().predict(batch()[0]).dtype == torch.bfloat16


def test_predict_is_of_a_student_in_eval_mode_and_leaves_it_as_it_was():
    d, images = distiller().train(), batch()[0]
    before = {name: x.clone() for name, x in d.student.state_dict().items()}
    torch.testing.assert_close(d.predict(images)[:1], d.predict(images[:1]))  # no statistics of the batch
    assert d.student.training
    assert all(torch.equal(x, before[name]) for name, x in d.student.state_dict().items())


def test_one_channel():
    d = Distiller(tiny_vit(in_chans=1), tiny_cnn(in_chans=1), "sfkd", input_size=64)
    assert d(*batch(channels=1)).loss.isfinite()


def test_label_free_teacher_without_a_classifier():
    d = Distiller(tiny_vit(num_classes=0), tiny_cnn(), "sfkd", input_size=64, kd_weight=0.0)
    output = d(batch()[0])
    assert output.teacher_logits is None
    assert set(output.terms) == {f"sfkd.layer{stage}" for stage in range(1, 5)}


def test_saved_student_is_plain_timm(tmp_path):
    d = distiller()
    path = tmp_path / "deep" / "student.safetensors"
    d.save_student(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tiny_cnn().state_dict())
        assert file.metadata()["architecture"] == "test_resnet"
    again = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path)).eval()
    x = torch.rand(2, 3, 64, 64)
    d.eval()
    assert torch.equal(again(x), d.student(x))
    assert torch.equal(load_model("test_resnet", num_classes=10, weights=path)(x), d.student(x))


def test_hugging_face_student_and_teacher_directories(tmp_path):
    teacher = hugging_face("vit", HUGGING_FACE[0][1])
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.7] * 3, size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "teacher"
    )
    hugging_face("resnet", HUGGING_FACE[7][1]).save_pretrained(tmp_path / "student")
    d = Distiller(f"hf:{tmp_path / 'teacher'}", f"hf:{tmp_path / 'student'}", "sfkd", input_size=64)
    assert input_spec(d.teacher).mean == (0.1, 0.1, 0.1)
    assert d.classes == 5
    check_step(d, *batch(4, 64, 5), terms_at_least=4)
    d.save_student(tmp_path / "out")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    d.eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(x).logits, d.student(x).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "resnet"


def test_a_backbone_directory_gets_no_random_head(tmp_path):
    hugging_face("dinov2", HUGGING_FACE[3][1], head=False).save_pretrained(tmp_path)
    d = Distiller(load_model(f"hf:{tmp_path}"), tiny_cnn(), "sfkd", kd_weight=0.0, input_size=64)
    assert d(batch()[0]).teacher_logits is None


def test_usable_in_a_plain_loop():
    d = distiller(feature_weight=1.0)
    images, labels = batch()
    optimizer = torch.optim.AdamW(d.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = d(images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_import_is_light():
    import subprocess
    import sys

    heavy = ("timm", "transformers", "kornia", "torchvision", "accelerate", "rich", "hetkd.training")
    code = f"import sys, hetkd; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert result.stdout.strip() == "[]"


def test_version():
    assert hetkd.__version__


def test_own_module_as_teacher_and_student():
    d = Distiller(OwnCNN(), OwnCNN(), "uhkd", input_size={"teacher": 64, "student": 32})
    check_step(d, *batch(), terms_at_least=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which PyTorch's compiler itself looks at
@pytest.mark.parametrize(
    ("teacher", "method"),
    [(tiny_vit, "kd"), (tiny_vit, "uhkd"), (tiny_vit, "sfkd"), (lambda: hugging_face(*HUGGING_FACE[0][:2]), "rsd")],
)
def test_compiled_parts_give_the_same_losses_gradients_and_predictions(teacher, method):
    torch._dynamo.reset()
    counters.clear()
    plain = Distiller(teacher(), tiny_cnn(), method, input_size=32, stages=[2, 3] if method == "rsd" else None)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager")
    images, labels = batch(6)
    expected, found = plain.train()(images, labels), compiled.train()(images, labels)
    assert counters["stats"]["unique_graphs"] > 3
    assert not counters["graph_break"]
    torch.testing.assert_close(found.terms, expected.terms)
    for output in (expected, found):
        output.loss.backward()
    gradients = [{name: p.grad for name, p in d.named_parameters() if p.grad is not None} for d in (plain, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(compiled.eval().predict(images), plain.eval().predict(images))


def test_compiling_without_effect_is_said():
    torch._dynamo.reset()
    counters.clear()
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32)
    distiller.compile()
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="compile had no effect"):
        distiller(*batch(4))
    flat = nn.Linear(12, 10)
    with pytest.warns(RuntimeWarning, match="leaves the student as it is"):
        compile_parts({"student": blocks(flat)}, {})


@pytest.mark.parametrize("method", ["sfkd", "uhkd"])
def test_half_precision_students_do_not_round_the_method(method):
    distiller = Distiller(tiny_vit(), tiny_cnn(), method, input_size=32)
    before = {name: x.clone() for name, x in (*distiller.method.named_parameters(), *distiller.method.named_buffers())}
    distiller.to(torch.bfloat16)
    assert next(distiller.student.parameters()).dtype == torch.bfloat16
    after = dict((*distiller.method.named_parameters(), *distiller.method.named_buffers()))
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert distiller(*batch(4)).loss.isfinite()
