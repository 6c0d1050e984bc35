"""Models of every family and library are tapped at the stages that they should be."""

import pytest
import timm
import torch
import torchvision.models
from conftest import tiny_cnn
from torch import nn
from transformers_models import HUGGING_FACE, hugging_face

from hetkd import Distiller
from hetkd.features.pairing import choose_stages
from hetkd.features.probe import probe
from hetkd.features.registry import find_adapter

TIMM = [
    ("resnet18", "CNN", 64, [16, 8, 4, 2]),
    ("mobilenetv2_035", "CNN", 64, [16, 8, 4, 2]),
    ("mobilenetv3_small_050", "CNN", 64, [16, 8, 4, 2]),
    ("efficientnet_b0", "CNN", 64, [16, 8, 4, 2]),
    ("convnext_atto", "CNN", 64, [16, 8, 4, 2]),
    ("regnetx_002", "CNN", 64, [16, 8, 4, 2]),
    ("vgg11", "CNN", 64, [16, 8, 4, 2]),
    ("vit_tiny_patch16_224", "ViT", 64, [4, 4, 4, 4]),
    ("deit_tiny_patch16_224", "ViT", 64, [4, 4, 4, 4]),
    ("deit_tiny_distilled_patch16_224", "ViT", 64, [4, 4, 4, 4]),
    ("beit_base_patch16_224", "ViT", 32, [2, 2, 2, 2]),
    ("vit_small_patch14_reg4_dinov2", "ViT", 56, [4, 4, 4, 4]),
    ("swin_tiny_patch4_window7_224", "Swin", 224, [56, 28, 14, 7]),
    ("swinv2_tiny_window8_256", "Swin", 256, [64, 32, 16, 8]),
    ("mixer_s32_224", "MLP-Mixer", 224, [7, 7, 7, 7]),
    ("resmlp_12_224", "MLP-Mixer", 224, [14, 14, 14, 14]),
    ("gmlp_ti16_224", "MLP-Mixer", 224, [14, 14, 14, 14]),
    ("cait_xxs24_224", "ViT", 224, [14, 14, 14, 14]),
    ("crossvit_tiny_240", "ViT", 240, [20, 20, 14, 14]),
    ("naflexvit_base_patch16_gap", "ViT", 32, [2, 2, 2, 2]),
    ("samvit_base_patch16_224", "ViT", 224, [14, 14, 14, 14]),
    ("xcit_nano_12_p8_224", "ViT", 64, [8, 8, 8, 8]),
    ("pvt_v2_b0", "hierarchical ViT", 64, [16, 8, 4, 2]),
    ("hiera_tiny_224", "hierarchical ViT", 224, [56, 28, 14, 7]),
    ("mvitv2_tiny", "hierarchical ViT", 224, [56, 28, 14, 7]),
    ("coat_tiny", "hybrid", 224, [56, 28, 14, 7]),
    ("test_coatnet", "hybrid", 160, [40, 20, 10, 5]),
    ("test_maxvit", "hybrid", 160, [40, 20, 10, 5]),
    ("test_mambaout", "hybrid", 64, [16, 8, 4, 2]),
    ("levit_128s", "hybrid", 224, [14, 7, 4]),
    ("efficientformer_l1", "hybrid", 224, [56, 28, 14, 7]),
    ("fastvit_t8", "hybrid", 64, [16, 8, 4, 2]),
    ("mobilevit_xxs", "hybrid", 64, [16, 8, 4, 2]),
    ("vit_tiny_r_s16_p8_224", "hybrid", 224, [7, 7, 7, 7]),
    ("sequencer2d_s", "hybrid", 64, [9, 4, 4, 4]),
]


def timm_model(name: str, pixels: int) -> nn.Module:
    fixed = any(word in name for word in ("vit_", "deit", "beit")) and "fast" not in name and "mobile" not in name
    return timm.create_model(name, pretrained=False, **({"img_size": pixels} if fixed else {})).eval()


def check_tap(model: nn.Module, family: str, pixels: int, grids: list[int], expected) -> None:
    adapter = find_adapter(model)
    assert adapter.family == family
    x = torch.randn(2, 3, pixels, pixels)
    stages, classes, *_ = probe(adapter, model, x[:1])
    chosen = choose_stages(stages)
    assert [stage.grid for stage in chosen] == [(grid, grid) for grid in grids]
    stem = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    calls = []
    handle = stem.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        features = adapter.run(model, x, [stage.name for stage in chosen])
        handle.remove()
        assert len(calls) == 1
        for stage, x_map in zip(chosen, features.maps, strict=True):
            assert tuple(x_map.shape) == (2, stage.channels, *stage.grid)
            assert x_map.std() > 0
        if expected is None:
            assert features.logits is None
            assert classes is None
        else:
            assert torch.equal(features.logits, expected(x))
            assert features.pooled is not None
            assert features.pooled.ndim == 2
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        if norms:
            adapter.run(model.train(), x, [stage.name for stage in chosen])
            assert {norm.num_batches_tracked.item() for norm in norms} == {1}


@pytest.mark.parametrize(("name", "family", "pixels", "grids"), TIMM)
def test_timm(name, family, pixels, grids):
    model = timm_model(name, pixels)
    check_tap(model, family, pixels, grids, None if "dinov2" in name else model)


TORCHVISION = [
    ("resnet18", "CNN", 64, [16, 8, 4, 2]),
    ("mobilenet_v2", "CNN", 64, [16, 8, 4, 2]),
    ("convnext_tiny", "CNN", 64, [16, 8, 4, 2]),
    ("regnet_y_400mf", "CNN", 64, [16, 8, 4, 2]),
    ("vit_b_32", "ViT", 224, [7, 7, 7, 7]),
    ("swin_t", "Swin", 64, [16, 8, 4, 2]),
]


@pytest.mark.parametrize(("name", "family", "pixels", "grids"), TORCHVISION)
def test_torchvision(name, family, pixels, grids):
    model = torchvision.models.get_model(name, weights=None).eval()
    check_tap(model, family, pixels, grids, model)


@pytest.mark.parametrize(("model_type", "options", "family", "grids"), HUGGING_FACE)
def test_hugging_face(model_type, options, family, grids):
    model = hugging_face(model_type, options)
    check_tap(model, family, 64, grids, lambda x: model(x).logits)


@pytest.mark.parametrize("model_type", ["dinov2", "convnext"])
def test_hugging_face_without_a_classifier(model_type):
    options = next(options for name, options, *_ in HUGGING_FACE if name == model_type)
    model = hugging_face(model_type, options, head=False)
    check_tap(
        model,
        "ViT" if model_type == "dinov2" else "CNN",
        64,
        [4] * 4 if model_type == "dinov2" else [16, 8, 4, 2],
        None,
    )


@pytest.mark.parametrize("index", [0, 2, 3])
def test_hugging_face_vits_at_a_size_that_is_not_their_own(index):
    model_type, options, _, _ = HUGGING_FACE[index]
    model = hugging_face(model_type, options)
    d = Distiller(model, tiny_cnn(num_classes=5), "sfkd", input_size={"teacher": 96, "student": 64})
    assert d.plan.rows[0].teacher_shape == (32, 6, 6)
    x = d.taps["teacher"].prepare(torch.rand(2, 3, 96, 96))
    kwargs = {"interpolate_pos_encoding": True} if model_type == "vit" else {}
    assert torch.equal(d.taps["teacher"].adapter.run(model, x, []).logits, model(x, **kwargs).logits)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [(name, 64) for name in ("efficientnet_b0", "mobilenetv2_035", "resnet18", "resnetv2_18", "nf_resnet26")],
)
def test_the_last_stage_is_the_map_before_pooling(name, pixels):
    model = timm_model(name, pixels)
    x = torch.randn(2, 3, pixels, pixels)
    adapter = find_adapter(model)
    stages, *_ = probe(adapter, model, x)
    features = adapter.run(model, x, [stages[-1].name])
    torch.testing.assert_close(features.maps[0].mean((2, 3)), features.pooled)
