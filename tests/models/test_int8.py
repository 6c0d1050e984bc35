"""Training for int8: what is rounded, what is saved, and that the exported file answers as simulated."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_cnn, tiny_vit
from torch import nn
from torch.nn.utils import parametrizations
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller, bench, export, load_model, load_student, simulate_int8
from hetkd.features.hooks import find_classifier
from hetkd.models.int8 import is_simulated, without_simulation
from hetkd.training.classifier import fit_classifier


def layer(width=4):
    torch.manual_seed(0)
    return nn.Conv2d(3, width, 3, padding=1, bias=False)


def test_weights_have_255_steps_a_channel_and_inputs_256():
    plain, x = layer(), torch.rand(8, 3, 6, 6) - 0.25
    model = simulate_int8(nn.Sequential(layer())).train()
    found = model(x)
    scale = plain.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (plain.weight / scale).round() * scale
    step = (x.max() - x.min()) / 255
    zero = (-x.min() / step).round()
    rounded = ((x / step).round() + zero).clamp(0, 255) - zero
    torch.testing.assert_close(found, F.conv2d(rounded * step, weight, padding=1), atol=1e-4, rtol=1e-4)
    found.square().mean().backward()
    assert model[0]._parameters["weight"].grad.abs().sum() > 0


def test_the_range_of_inputs_is_that_of_training():
    model = simulate_int8(nn.Sequential(layer())).train()
    for _ in range(300):
        model(torch.rand(4, 3, 6, 6))
    model.eval()
    ones = model(torch.ones(1, 3, 6, 6))
    torch.testing.assert_close(model(9 * torch.ones(1, 3, 6, 6)), ones, msg="larger inputs are cut off")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.rand(4, 3, 6, 6))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_without_simulation_is_the_model_with_its_trained_weights():
    model = tiny_cnn()
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    simulate_int8(model)
    assert is_simulated(model)
    plain = without_simulation(model)
    assert not is_simulated(plain)
    assert is_simulated(model), "the model itself stays prepared"
    assert [name for name, _ in plain.named_parameters()] == names
    assert list(plain.state_dict()) == keys
    assert [type(module) for module in plain.modules()] == [type(module) for module in tiny_cnn().modules()]
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), tiny_cnn_like(plain)(x))
    assert without_simulation(plain) is plain


def tiny_cnn_like(plain):
    model = tiny_cnn()
    model.load_state_dict(plain.state_dict())
    return model.eval()


def test_stages_are_those_of_the_plain_student():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            widths = (3, 8, 12, 16)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            )
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    for make in (Own, tiny_cnn, tiny_vit):
        plans = [
            str(Distiller(tiny_vit(), change(make()), "sfkd", input_size=32).plan) for change in (id_, simulate_int8)
        ]
        assert plans[0] == plans[1]


def id_(model):
    return model


def test_bad_models():
    with pytest.raises(ValueError, match="prepared for int8 already"):
        simulate_int8(simulate_int8(tiny_cnn()))
    with pytest.raises(ValueError, match="neither convolutions nor linear layers"):
        simulate_int8(nn.ReLU())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfkd", "rsd", "kd"])
def test_a_prepared_student_is_trained_stopped_and_resumed_bit_for_bit(method, tmp_path):
    def run(folder, epochs, **options):
        torch.manual_seed(0)
        student = simulate_int8(load_model("timm:test_resnet", pretrained=False, num_classes=10))
        distiller = Distiller(tiny_vit(), student, method, input_size=32)
        distiller.fit(bright_or_dark(32), epochs=epochs, output_dir=folder, **options, **QUIET)
        return distiller

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 2, max_steps=1)
    again = run(tmp_path / "parts", 2, resume=True, max_steps=None)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name
    saved = load_student(tmp_path / "whole" / "last.safetensors")
    assert not is_simulated(saved.distillation.student)
    assert bench(whole).parameters == bench(saved.distillation).parameters


def test_copies_and_pickles_are_prepared_alike():
    model = simulate_int8(tiny_cnn()).eval()
    x = torch.rand(2, 3, 32, 32)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_simulated(again)
        assert torch.equal(again(x), model(x))
    assert torch.isfinite(model.bfloat16()(x.bfloat16())).all()


def test_a_classifier_that_is_fitted_first_is_the_one_that_is_used(tmp_path):
    images, labels = bright_or_dark(64)
    student = simulate_int8(tiny_cnn())
    head = find_classifier(student)
    before = head._parameters["weight"].clone()
    fit_classifier(Distiller(None, student, "ce", input_size=32), [(images, labels)])
    assert not torch.equal(head._parameters["weight"], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.TransformerEncoderLayer(8, 2),
            "self_attn is a MultiheadAttention, which simulate_int8 does not know",
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), "0 is a ConvTranspose2d"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))), "is computed"),
    ],
)
def test_layers_that_are_not_simulated_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        simulate_int8(make())


@pytest.mark.slow
def test_the_exported_file_answers_as_simulated(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    student = simulate_int8(load_model("timm:test_resnet", pretrained=False, num_classes=2))
    distiller = Distiller(None, student, "ce", input_size=32)
    labels = torch.arange(64) % 2
    images = 0.6 * torch.rand(64, 3, 32, 32)
    images[labels == 1, 0] += 0.2
    data = (images, labels)
    distiller.fit(data, data, epochs=10, batch_size=8, output_dir=tmp_path / "run", **QUIET)
    assert distiller.evaluate(data)["top1"] > 90
    file = tmp_path / "run" / "last.safetensors"
    report = export(file, tmp_path / "student.onnx", int8=True, images=data)
    assert report.top1[1] > 90
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    pixels = (255 * images).round().byte()
    (int8,) = session.run(None, {"images": pixels.numpy()})
    simulated = distiller.predict(pixels).detach().softmax(1)
    assert (simulated - torch.from_numpy(int8)).abs().mean() < 0.02
