"""Teachers for small images."""

import copy
import json

import pytest
import torch
from running import tiny_data
from safetensors.torch import load_file

from hetkd import Distiller


@pytest.mark.parametrize("name", ["vit", "swin", "mixer", "convnext", "deit", "swin_p", "resmlp", "resnet10t"])
@pytest.mark.parametrize(("pixels", "channels"), [(28, 1), (32, 3)])
def test_zoo_models_are_distilled_at_small_sizes(name, pixels, channels):
    from hetkd import models as zoo

    model, size = zoo.build_small(name, pixels, 7 if channels == 3 else 10, channels)
    distiller = Distiller(
        model,
        "timm:test_resnet" if channels == 3 else copy.deepcopy(model),
        "sfkd",
        input_size={"teacher": size, "student": size if channels == 1 else 64},
    )
    assert len(distiller.method.pairs) == (2 if name.startswith("swin") else 3)
    assert distiller(torch.rand(4, channels, pixels, pixels), torch.arange(4)).loss.isfinite()


def test_train_teacher_goes_on_and_saves_in_half_precision(tmp_path):
    import small_teacher

    path = small_teacher.teacher_path(tmp_path, tiny_data(), "convnext")
    options = {"epochs": 2, "batch_size": 16, "progress": False}
    top1 = small_teacher.train_teacher("convnext", tiny_data(), path, **options)
    again = small_teacher.train_teacher("convnext", tiny_data(), path, **options)
    assert again == top1 == json.loads(path.with_suffix(".json").read_text())["top1"]
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file(path).values())


def test_train_teacher_lets_a_model_learn_from_a_saved_one(tmp_path):
    import small_teacher

    data, options = tiny_data(), {"epochs": 1, "batch_size": 16, "progress": False}
    first, second = (small_teacher.teacher_path(tmp_path, data, model) for model in ("convnext", "resnet10t"))
    small_teacher.train_teacher("convnext", data, first, **options)
    small_teacher.train_teacher("resnet10t", data, second, taught_by=first, **options)
    record = json.loads((second.with_suffix("") / "history.json").read_text())[0]
    assert {"train/ce", "train/kd", "train/uhkd.layer3"} <= set(record)
    with pytest.raises(ValueError, match=r"student\.safetensors' has no name that this script gives"):
        small_teacher.train_teacher("resnet10t", data, second, taught_by=tmp_path / "student.safetensors", **options)
    with pytest.raises(SystemExit):
        small_teacher.parse_arguments(["--taught-by", str(tmp_path / "none.safetensors")])


def test_train_teacher_starts_from_the_dinov2_weights(tmp_path, data_folder):
    from hetkd import models as zoo

    weights = next((data_folder / "dinov2_vits14").glob("*.safetensors"))
    model, size = zoo.build_small("vit_small_patch14_dinov2", 28, 5, 3, pretrained=weights)
    assert size == 28
    expected = load_file(weights)["blocks.3.mlp.fc1.weight"].float()
    torch.testing.assert_close(model.blocks[3].mlp.fc1.weight.detach(), expected)
    assert model.head.out_features == 5
