"""What holds for every method."""

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from hetkd import (
    CC,
    CRD,
    DIST,
    DKD,
    OFA,
    RKD,
    RSD,
    DeiT,
    Distiller,
    list_methods,
)

EVERY = ["at", "cc", "ce", "crd", "deit", "dist", "dkd", "fitnet", "kd", "ofa", "rkd", "rsd", "sfkd", "uhkd"]


def test_all_methods_are_listed():
    assert [name for name in list_methods("classification") if not name.startswith("test-")] == EVERY
    assert set(list_methods()) - set(list_methods("classification")) == {"cwd"}


def family_models() -> dict[str, nn.Module]:
    return {
        "cnn": tiny_cnn(),
        "vit": tiny_vit(),
        "swin": SwinTransformer(
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
            num_classes=10,
        ),
        "mixer": MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=4, num_classes=10),
    }


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("vit", "cnn"), ("swin", "cnn"), ("mixer", "cnn"), ("cnn", "vit"), ("cnn", "mixer"), ("cnn", "swin")],
)
def test_every_method_on_every_kind_of_pair(teacher, student, method):
    models = family_models()
    for model in models.values():  # timm starts some heads at zero, which say nothing
        nn.init.normal_(model.get_classifier().weight, std=0.1)
    sizes = {"teacher": 32, "student": 32}
    distiller = Distiller(models[teacher], models[student], method, input_size=sizes)
    images, labels = batch()
    output = distiller(images, labels)
    output.loss.backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in output.terms.values())
    assert all(term.item() > 0 for term in output.terms.values())
    assert sum(row.added_parameters for row in distiller.plan.rows) == distiller.plan.added_parameters
    untaught = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert not untaught
    first = next(p for p in models[student].parameters() if p.ndim == 4)
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["fitnet", "at", "cc", "rkd", "crd", "rsd", "sfkd", "uhkd"])
def test_feature_methods_without_labels_and_without_logits(method):
    teacher = tiny_vit(num_classes=0)
    student = tiny_cnn(num_classes=0)
    distiller = Distiller(teacher, student, method, ce_weight=0, kd_weight=0, input_size=32)
    output = distiller(batch()[0])
    output.loss.backward()
    assert output.loss > 0
    assert next(student.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["rkd", "cc", "rsd", "dist", "crd", "ofa", "sfkd", "uhkd"])
def test_a_batch_of_one_is_refused_in_training(method):
    distiller = Distiller(tiny_vit(), tiny_cnn(), method, input_size=32)
    with pytest.raises(ValueError, match="a batch of one image"):
        distiller(*batch(1))


@pytest.mark.parametrize("method", ["rkd", "cc", "rsd", "ofa", ["kd", "cc"]])
def test_a_batch_of_one_a_process_is_refused_where_processes_do_not_look_at_others(method, monkeypatch):
    monkeypatch.setattr("hetkd.distillation.world_size", lambda: 2)
    distiller = Distiller(tiny_vit(), tiny_cnn(), method, input_size=32)
    with pytest.raises(ValueError, match="a batch of one image"):
        distiller(*batch(1))


def test_bad_options_are_refused():
    for method in (DKD, DIST, DeiT):
        with pytest.raises(ValueError, match="kd_weight=0 leaves method"):
            method(kd_weight=0)
    with pytest.raises(ValueError, match="distance_weight and angle_weight are all 0"):
        RKD(distance_weight=0, angle_weight=0)
    with pytest.raises(ValueError, match=r"negatives=0\.5"):
        CRD(negatives=0.5)
    with pytest.raises(ValueError, match="empty list"):
        Distiller([], tiny_cnn(), "kd")
    with pytest.raises(ValueError, match="alpha=-1"):
        DKD(alpha=-1)
    with pytest.raises(ValueError, match="scores 'logit'"):
        DIST(scores="logit")
    with pytest.raises(ValueError, match="gamma=0"):
        OFA(gamma=0)
    with pytest.raises(ValueError, match="expansion=0"):
        RSD(expansion=0)
    with pytest.raises(ValueError, match="negatives=-5"):
        CRD(negatives=-5)
    with pytest.raises(ValueError, match="form 'matrix'"):
        CC(form="matrix")
