"""Size and speed of models."""

import pytest
import torch
from conftest import tiny_vit
from torch import nn

from hetkd import Distiller, bench


def test_operations_of_a_layer_are_those_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.image_size = 16
    speed = bench(model, batch_size=2)
    assert speed.gigaflops == pytest.approx(2 * 16 * 16 * 8 * 3 * 9 / 1e9)
    assert speed.parameters == 3 * 8 * 9
    assert speed.images_per_second > 0


def test_fused_attention_is_counted_too():
    fused, plain = tiny_vit(), tiny_vit()
    for block in plain.blocks:
        block.attn.fused_attn = False
    assert bench(fused, batch_size=1).gigaflops == pytest.approx(bench(plain, batch_size=1).gigaflops)


def test_what_is_in_training_stays_so():
    distiller = Distiller(None, tiny_vit(), "ce", input_size=32)
    distiller.train()
    distiller.student.blocks[0].eval()
    before = [module.training for module in distiller.modules()]
    assert "ms an image" in str(bench(distiller, batch_size=2))
    assert [module.training for module in distiller.modules()] == before
    with pytest.raises(ValueError, match="batch_size=0"):
        bench(distiller, batch_size=0)
    assert torch.is_grad_enabled()
