"""Fine-tuning of teachers: any library's model, with a classifier or without, on any data."""

import pytest
import timm
import torch
import torchvision
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from torch import nn
from training_runs import QUIET
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers_models import HUGGING_FACE

import hetkd
from hetkd import Distiller, finetune, finetuning
from hetkd.models import save_model
from hetkd.models.heads import WithHead, with_classes
from hetkd.training.classifier import fit_classifier, logistic_regression


def colours(count: int = 60, classes: int = 3, pixels: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is their strongest channel."""
    labels = torch.arange(count) % classes
    images = 0.3 * torch.rand(count, 3, pixels, pixels)
    images[torch.arange(count), labels] += 0.4
    return images, labels


class Backbone(nn.Module):
    """Maps of features, without a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))


def hugging_face(kind, **options):
    config = ViTConfig(**HUGGING_FACE[0][1], **options)
    config.architectures = []
    return kind(config)


MODELS = {
    "timm, other classes": tiny_cnn,
    "timm, no classifier": lambda: tiny_vit(num_classes=0),
    "hugging face, other classes": lambda: hugging_face(ViTForImageClassification, num_labels=7),
    "hugging face, backbone": lambda: hugging_face(ViTModel),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=9),
    "torchvision, convolution": lambda: torchvision.models.squeezenet1_1(num_classes=9),
    "own backbone": Backbone,
    "own, as many classes": lambda: nn.Sequential(Backbone(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_fine_tuned_and_teaches(name, tmp_path, capsys):
    torch.manual_seed(0)
    data = colours()
    size = None if name.startswith("hugging") else 64 if name == "torchvision, convolution" else 32
    options = {"epochs": 1, "batch_size": 20, "output_dir": tmp_path, "input_size": size, **QUIET}
    found = finetune(MODELS[name](), data, data, **options)
    assert found.top1 is not None
    assert found.top1 >= (30 if "convolution" in name else 60)  # which has no linear layer to begin with
    assert found.path.exists()
    assert f"Distiller({str(found.path)!r}, STUDENT)" in capsys.readouterr().out
    sizes = {"student": 32} if size is None else {"teacher": size, "student": 32}
    taught = Distiller(found.model, tiny_cnn(num_classes=3), "kd", input_size=sizes)
    assert taught.evaluate(data, role="teacher")["top1"] == pytest.approx(found.top1)


def test_what_was_fine_tuned_loads_by_its_path_alone(tmp_path):
    data = colours()
    save_model(tiny_cnn(num_classes=7), tmp_path / "w.safetensors")
    common = {"weights": tmp_path / "w.safetensors", "input_size": 32, "output_dir": tmp_path, **QUIET}
    found = finetune("timm:test_resnet", data, data, epochs=1, batch_size=20, **common)
    again = hetkd.load_model(str(found.path))
    assert torch.equal(again(data[0]), found.model(data[0]))
    distiller = Distiller(str(found.path), tiny_cnn(num_classes=3), "kd", input_size={"student": 32})
    assert distiller.taps["teacher"].size == (32, 32)
    assert distiller.evaluate(data, role="teacher")["top1"] == pytest.approx(found.top1)


def test_the_classifier_comes_first_and_is_the_best_linear_one():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x[:, 0] + 0.1 * torch.randn(400) > 0).long() + 2 * (x[:, 1] > 0.3).long()
    weight, bias = logistic_regression(5 * x + 3, y, 4, 1e-4)
    logits = (5 * x + 3) @ weight.T + bias
    assert (logits.argmax(1) == y).double().mean() > 0.93
    w, b = weight.clone().requires_grad_(True), bias.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy((5 * x + 3) @ w.T + b, y)
    loss.backward()
    assert b.grad.norm() < 1e-3  # no better bias


def test_only_the_classifier_changes_when_it_comes_first():
    torch.manual_seed(0)
    distiller = Distiller(None, tiny_vit(num_classes=3), "ce", input_size=32)
    before = {name: x.clone() for name, x in distiller.student.state_dict().items()}
    fit_classifier(distiller, [colours()])
    after = distiller.student.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.weight", "head.bias"]
    assert distiller.evaluate(colours())["top1"] > 80


def test_training_that_is_worse_than_the_classifier_alone_is_not_kept(tmp_path, capsys):
    torch.manual_seed(0)
    data = colours()
    options = {"epochs": 1, "batch_size": 20, "lr": 3.0, "layer_decay": None, "clip_grad": None}
    found = finetune(tiny_vit(), data, data, output_dir=tmp_path, input_size=32, **options, **QUIET)
    alone = float(capsys.readouterr().out.split("alone: top-1 ")[1].split(" %")[0])
    assert found.history[-1]["top1"] < alone
    assert found.top1 == pytest.approx(alone, abs=0.01)
    assert Distiller(None, found.model, "ce", input_size=32).evaluate(data)["top1"] == pytest.approx(found.top1)


def test_a_stopped_fine_tuning_goes_on(tmp_path):
    data = colours()
    common = {"batch_size": 20, "output_dir": tmp_path, "input_size": 32, "epochs": 3, "patience": None, **QUIET}

    def stop(moment):
        raise KeyboardInterrupt

    torch.manual_seed(0)
    whole = finetune(tiny_cnn(), data, data, **{**common, "output_dir": tmp_path / "whole"})
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_cnn(), data, data, callbacks=[stop], **common)
    torch.manual_seed(0)
    again = finetune(tiny_cnn(), data, data, resume=True, **common)
    assert [record["top1"] for record in again.history] == [record["top1"] for record in whole.history]


def test_classes_come_from_the_labels_or_have_to_be_said(tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*colours()), batch_size=20)
    with pytest.raises(ValueError, match="say num_classes="):
        finetune(tiny_cnn(), iter_only(loader), epochs=1, output_dir=tmp_path, **QUIET)
    found = finetune(tiny_cnn(), loader, epochs=1, num_classes=4, output_dir=tmp_path, input_size=32, **QUIET)
    assert found.model.num_classes == 4
    assert found.top1 is None


def iter_only(loader):
    class Stream:
        def __iter__(self):
            return iter(loader)

    return Stream()


@pytest.mark.parametrize(("size", "expected"), [(None, 224), (112, 112)])
def test_large_models_are_fine_tuned_at_224_pixels_unless_told(size, expected, tmp_path):
    name = "vit_tiny_patch16_384"
    save_model(timm.create_model(name, depth=1), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit"):  # which has one block
        finetuning._distiller(f"timm:{name}", 3, tmp_path / "w.safetensors", size)
    assert finetuning._pixels(f"timm:{name}") == 224
    assert finetuning._pixels("timm:resnet18") is None
    assert finetuning._sized(name, expected, {"pretrained": False, "depth": 1}).patch_embed.img_size == (expected,) * 2


def test_a_new_head_replaces_an_old_one_of_another_size():
    example = torch.rand(2, 3, 32, 32)
    assert with_classes(Backbone(), 5, None, example)(example).shape == (2, 5)
    assert isinstance(with_classes(Backbone(), 5, None, example), WithHead)
    with pytest.raises(ValueError, match="no layer of its 12 classes"):
        with_classes(nn.Sequential(nn.Flatten(), nn.Identity()), 5, 12, example)


def photos(root, names="abc", count=6):
    """Folders of pictures, a colour a class."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = [10 * index] * 3
            colour[number % 3] = 220
            Image.new("RGB", (40, 40), tuple(colour)).save(root / name / f"{index}.png")
    return root


def test_names_of_the_folders_are_in_the_order_that_the_model_knew(tmp_path):
    train = photos(tmp_path / "train")
    known = Distiller(None, tiny_cnn(num_classes=3), "ce", input_size=32)
    known.class_names = ["c", "b", "a"]
    known.save_student(tmp_path / "known.safetensors")
    found = finetune(str(tmp_path / "known.safetensors"), train, train, epochs=0, output_dir=tmp_path, **QUIET)
    assert found.top1 == 100
    student = hetkd.load_student(found.path)
    assert student.classes == ["c", "b", "a"]
    assert [student.predict(train / name / "0.png").label for name in "abc"] == ["a", "b", "c"]


def test_a_model_that_is_there_is_not_overwritten_and_errors_come_first(tmp_path, capsys):
    data = colours()
    options = {"epochs": 0, "output_dir": tmp_path, "input_size": 32, **QUIET}
    finetune(tiny_cnn(), data, data, **options)
    capsys.readouterr()
    with pytest.raises(FileExistsError, match="go on with resume=True"):
        finetune(tiny_cnn(), data, data, **options)
    with pytest.raises(ValueError, match="'learning_rate': it is called 'lr' here"):
        finetune(tiny_cnn(), data, data, **{**options, "output_dir": tmp_path / "other"}, learning_rate=1)
    assert "classifier alone" not in capsys.readouterr().out


def test_what_was_fitted_first_is_there_after_a_crash(tmp_path, monkeypatch):
    data, options = colours(), {"batch_size": 20, "output_dir": tmp_path, "input_size": 32, **QUIET}

    def crash(*arguments, **more):
        raise RuntimeError("power")

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "fit", crash)
        with pytest.raises(RuntimeError, match="power"):
            finetune(tiny_vit(), data, data, epochs=1, **options)
    worse = {"lr": 3.0, "layer_decay": None, "clip_grad": None, "warmup_epochs": 0.0}
    first = finetune(tiny_vit(), data, data, epochs=1, resume=True, **worse, **options)
    assert first.history[-1]["top1"] < first.top1  # the classifier alone, from disk
    again = finetune(tiny_vit(), data, data, epochs=1, resume=True, **worse, **options)
    assert again.top1 == first.top1
    assert torch.equal(again.model.head.weight, first.model.head.weight)


def test_a_classifier_of_other_data_is_not_taken_over(tmp_path, monkeypatch):
    images, labels = colours()
    options = {"epochs": 0, "output_dir": tmp_path, "input_size": 32, **QUIET}
    finetune(tiny_vit(), (images, (labels + 1) % 3), **options)
    (tmp_path / "vit_tiny_patch16_224.safetensors").unlink()  # as if it had come no further
    assert (tmp_path / "vit_tiny_patch16_224.head.safetensors").exists()
    assert finetune(tiny_vit(), (images, labels), (images, labels), **options).top1 > 80


def test_more_epochs_go_on_at_the_rate_of_before(tmp_path):
    data, options = colours(), {"batch_size": 20, "output_dir": tmp_path, "input_size": 32, **QUIET}
    finetune(tiny_cnn(), data, data, epochs=1, **options)
    assert len(finetune(tiny_cnn(), data, data, epochs=2, resume=True, **options).history) == 2


def test_unreadable_pictures_are_skipped_in_both_parts(tmp_path):
    train = photos(tmp_path / "train")
    (train / "b" / "2.png").write_bytes(b"no picture")
    options = {"epochs": 1, "batch_size": 4, "input_size": 32, **QUIET}
    with pytest.raises(OSError, match=r"2\.png"):
        finetune(tiny_cnn(), train, train, output_dir=tmp_path / "one", **options)
    found = finetune(tiny_cnn(), train, train, output_dir=tmp_path / "two", unreadable="skip", **options)
    assert found.top1 is not None


def test_small_sets_are_given_time(tmp_path):
    assert finetuning._patience(2) == 30
    assert finetuning._patience(None) == finetuning._patience(100) == 3
