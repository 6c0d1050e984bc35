"""Models that are not what they look like: each is taken for what it is, or refused."""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import batch, tiny_cnn, tiny_vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller, load_model
from hetkd.models import save_model


class Embedding(nn.Module):
    """A backbone whose output is a normalised vector, as DINOv2's from torch.hub."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 10, 3, 2, 1), nn.ReLU())
        self.last = last

    def forward(self, x):
        return self.last(self.body(x).mean((2, 3)))


def without_fc() -> nn.Module:
    model = torchvision.models.resnet18(num_classes=10)
    model.fc = nn.Identity()
    return model


EMBEDDINGS = {
    "norm": lambda: Embedding(nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 10), Unit())),
    "pooling": lambda: Embedding(nn.Identity()),
    "torchvision": without_fc,
    "timm": lambda: tiny_vit(num_classes=0),
}


class Unit(nn.Module):
    def forward(self, x):
        return nn.functional.normalize((x - x.roll(1, 1)).square(), dim=1)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_no_logits(name):
    with pytest.raises(ValueError, match="the teacher has no classifier"):
        Distiller(EMBEDDINGS[name](), tiny_cnn(), "kd", input_size=32)
    distiller = Distiller(EMBEDDINGS[name](), tiny_cnn(), "rsd", input_size=32)
    output = distiller(*batch())
    assert output.teacher_logits is None
    assert sorted(output.terms) == ["ce", "rsd.pooled"]


LOGITS = {
    "linear": nn.Linear(10, 10),
    "softmax": nn.Sequential(nn.Linear(10, 10), nn.LogSoftmax(1)),
    "scaled": nn.Sequential(nn.Linear(10, 10), nn.Identity()),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_logits(name):
    assert "kd" in Distiller(Embedding(LOGITS[name]), tiny_cnn(), "kd", input_size=32)(*batch()).terms


def test_what_cannot_be_known_can_be_said():
    assert "kd" in Distiller(Embedding(Unit()), tiny_cnn(), "kd", input_size=32, teacher_classes=10)(*batch()).terms
    with pytest.raises(ValueError, match="has no classifier"):
        Distiller(Embedding(nn.Linear(10, 10)), tiny_cnn(), "kd", input_size=32, teacher_classes=0)
    with pytest.raises(ValueError, match="teacher_classes=7, but the teacher yields 10"):
        Distiller(Embedding(nn.Linear(10, 10)), tiny_cnn(), "kd", input_size=32, teacher_classes=7)


def test_batch_norms_in_eval_mode_stay_so():
    student = tiny_cnn()
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    before = [norm.running_mean.clone() for norm in norms]
    Distiller(None, student, "ce", input_size=32).fit(bright_or_dark(16), epochs=1, batch_size=8, **QUIET)
    assert torch.equal(norms[0].running_mean, before[0])
    assert not torch.equal(norms[-1].running_mean, before[-1])


def test_frozen_parts_in_eval_mode_stay_so_and_a_loaded_student_trains():
    student = tiny_cnn().eval()
    student.bn1.requires_grad_(False)
    before = student.bn1.running_mean.clone(), student.layer1[0].bn1.running_mean.clone()
    Distiller(None, student, "ce", input_size=32).fit(bright_or_dark(16), epochs=1, batch_size=8, **QUIET)
    assert torch.equal(student.bn1.running_mean, before[0])
    assert not torch.equal(student.layer1[0].bn1.running_mean, before[1])


def test_shared_modules_are_refused():
    teacher, student = tiny_cnn(), tiny_cnn()
    student.conv1 = teacher.conv1
    with pytest.raises(ValueError, match="share parameters or statistics"):
        Distiller(teacher, student, "kd", input_size=32)
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_cannot_be_exchanged():
    distiller = Distiller(None, tiny_cnn(), "ce", input_size=32)
    with pytest.raises(AttributeError, match="make a new Distiller"):
        distiller.student = tiny_cnn()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_in_half_precision_is_trained_in_full(dtype, capsys):
    student = tiny_cnn().to(dtype)
    before = copy.deepcopy(student.state_dict())
    distiller = Distiller(None, student, "ce", input_size=32)
    distiller.fit(bright_or_dark(32), epochs=1, batch_size=8, lr=1e-4, weight_decay=0.0, cpu=True)
    assert "trained in float32" in capsys.readouterr().out
    moved = [not torch.equal(x, before[name].float()) for name, x in distiller.student.named_parameters()]
    assert next(distiller.student.parameters()).dtype == torch.float32
    assert sum(moved) == len(moved)


def test_or_as_it_is_if_the_user_says_so():
    distiller = Distiller(None, tiny_cnn().bfloat16(), "ce", input_size=32)
    distiller.fit(bright_or_dark(16), epochs=1, batch_size=8, half_weights=True, **QUIET)
    assert next(distiller.student.parameters()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is deprecated
@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_scripted_and_exported_teachers_are_named(kind):
    model, images = tiny_cnn().eval(), torch.rand(2, 3, 32, 32)
    frozen = torch.jit.trace(model, images) if kind == "scripted" else torch.export.export(model, (images,)).module()
    with pytest.raises(TypeError, match=f"the teacher is {kind}"):
        Distiller(frozen, tiny_cnn(), "kd", input_size=32)


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_cnn()

    def forward(self, x):
        return self.inner(x)

    def get_extra_state(self):
        return {"anything": object()}

    def set_extra_state(self, state):
        pass


def test_a_state_that_no_checkpoint_holds_is_found_before_the_training(tmp_path):
    distiller = Distiller(None, WithState(), "ce", input_size=32)
    with pytest.raises(ValueError, match="extra_state holds a dict, but checkpoints hold tensors only"):
        distiller.fit(bright_or_dark(16), epochs=1, batch_size=8, output_dir=tmp_path / "run", **QUIET)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_branch_that_few_images_reach_is_trained(optimizer):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bright, self.dark = tiny_cnn(), tiny_cnn()

        def forward(self, x):
            return self.dark(x) if x.mean() < 0 else self.bright(x)

    student = Branching()
    before = {name: branch.fc.weight.clone() for name, branch in student.named_children()}
    images, labels = torch.zeros(24, 3, 32, 32), torch.arange(24) % 10
    images[8:16] = 1.0  # of the second step
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    Distiller(None, student, "ce", input_size=32).fit(loader, epochs=1, optimizer=optimizer, **QUIET)
    for name, branch in student.named_children():
        assert not torch.equal(branch.fc.weight, before[name]), name


def test_a_file_of_another_number_of_classes_is_loaded_without_its_head(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=1000), tmp_path / "x.safetensors")
    model = load_model("timm:test_resnet", num_classes=12, weights=tmp_path / "x.safetensors")
    assert model.fc.out_features == 12


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_sigmoid_at_the_end_is_refused_and_quantised_students():
    teacher = nn.Sequential(tiny_vit(), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"yields probabilities, all between 0 and 1.*\.logit\(\) after a sigmoid"):
        Distiller(teacher, tiny_cnn(), "kd", input_size={"teacher": 32, "student": 32})
    undone = Distiller(nn.Sequential(teacher, Logit()), tiny_cnn(), "kd", input_size={"teacher": 32, "student": 32})
    undone(*batch(4)).loss.backward()
    adds = nn.Sequential(tiny_cnn(), torch.ao.nn.quantized.FloatFunctional())  # float all the same
    adds.forward = adds[0].forward
    Distiller(None, adds, "ce", input_size=32)
    student = torch.ao.quantization.quantize_dynamic(tiny_cnn(), {nn.Linear})
    with pytest.raises(TypeError, match=r"student has quantised modules \(fc, .*\), which do not learn.*simulate_int8"):
        Distiller(None, student, "ce", input_size=32)


class Logit(nn.Module):
    def forward(self, x):
        return x.logit()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_that_end_in_a_softmax_are_refused(role):
    models, sizes = {"teacher": tiny_vit(), "student": tiny_cnn()}, {"teacher": 32, "student": 32}
    models[role] = nn.Sequential(models[role], nn.Softmax(1))
    with pytest.raises(ValueError, match=f"the {role} yields probabilities, all between 0 and 1, but losses"):
        Distiller(**models, method="kd", input_size=sizes)
    as_logits = nn.Sequential(models[role], Log())
    Distiller(**{**models, role: as_logits}, method="kd", input_size=sizes)(*batch(4)).loss.backward()


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def test_models_of_images_and_texts_are_refused_with_a_cure():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**small, "image_size": 32, "patch_size": 8}, {**small, "bos_token_id": 0, "eos_token_id": 1}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="takes texts beside images: pass its part for images, as transformers"):
        Distiller(clip, tiny_cnn(), "sfkd", kd_weight=0, input_size=32)


def test_a_teacher_that_ends_in_a_softmax_teaches_by_features_and_is_not_measured():
    sizes = {"teacher": 32, "student": 32}
    distiller = Distiller(nn.Sequential(tiny_vit(), nn.Softmax(1)), tiny_cnn(), "rsd", kd_weight=0, input_size=sizes)
    distiller(*batch(4)).loss.backward()
    with pytest.raises(ValueError, match="the teacher yields probabilities, and is measured by logits"):
        distiller.evaluate(bright_or_dark(8), role="teacher")
