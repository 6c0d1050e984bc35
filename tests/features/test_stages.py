"""Stages by name and by module path, and what a probe leaves alone."""

import copy

import pytest
import timm
import torch
from conftest import batch, tiny_cnn, tiny_vit
from transformers_models import OwnCNN

from hetkd import Distiller
from hetkd.features.hooks import first_tensor
from hetkd.features.probe import probe
from hetkd.features.registry import find_adapter


def test_naming_a_module_leaves_rows_and_depths_as_they_were():
    def stages(*choices):
        d = Distiller(tiny_vit(depth=8), "test_resnet", "sfkd", stages=list(choices), input_size=64)
        return [(row.teacher, row.student) for row in d.plan.rows if row.stage != "logits"]

    extra = ("blocks.5.mlp", "layer1.0.conv1")
    assert stages(2, extra)[0] == stages(2)[0]
    assert stages("layer2", extra)[0] == stages("layer2")[0]
    assert stages(1, 2, extra)[:2] == stages(1, 2)


def test_stages_by_module_path_beside_those_that_are_listed():
    student = timm.create_model("resnet18", num_classes=10)
    d = Distiller(tiny_vit(), student, "sfkd", stages=["layer2", "layer4.1"], input_size=64)
    assert [row.student for row in d.plan.rows if row.stage != "logits"] == ["layer2", "layer4.1"]


def test_stages_of_both_sides_by_module_path():
    teacher = tiny_vit()
    d = Distiller(teacher, OwnCNN(), "sfkd", stages=[("blocks.1.mlp", "body.2")], input_size=64)
    row = d.plan.rows[0]
    assert (row.teacher, row.teacher_shape, row.student, row.student_shape) == (
        "blocks.1.mlp",
        (24, 4, 4),
        "body.2",
        (16, 16, 16),
    )
    seen = []
    handle = teacher.blocks[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    maps = d.taps["teacher"].run(torch.rand(2, 3, 32, 32)).maps
    handle.remove()
    assert torch.equal(maps[0], seen[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    with pytest.raises(ValueError, match=r"stages has \['head'\] of the student, where no feature map comes out"):
        Distiller(tiny_vit(), OwnCNN(), "sfkd", stages=["head"], input_size=64)
    with pytest.raises(ValueError, match=r"unknown student stage 'body.22': did you mean 'body.2'"):
        Distiller(tiny_vit(), OwnCNN(), "sfkd", stages=["body.22"], input_size=64)


def test_a_stage_by_module_path_stands_where_it_runs():
    model = timm.create_model("resnet18", num_classes=10).eval()
    stages, *_ = probe(find_adapter(model), model, torch.rand(1, 3, 64, 64), ["layer4.0", "layer1.0", "maxpool"])
    names = [stage.name for stage in stages]
    assert names == ["act1", "maxpool", "layer1.0", "layer1", "layer2", "layer3", "layer4.0", "layer4"]


def test_probe_leaves_modes_and_statistics_alone():
    model = tiny_cnn().train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    probe(find_adapter(model), model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_batch_statistics_are_updated_once():
    model = tiny_cnn().train()
    distiller = Distiller(tiny_vit(), model, "sfkd", input_size=32)
    distiller(*batch())
    assert model.bn1.num_batches_tracked == 1


def test_a_stage_that_does_not_run_is_an_error():
    class Lazy(OwnCNN):
        def forward(self, x):
            return self.head(self.body[:4](x).mean((2, 3)).repeat(1, 2)[:, :24])

    adapter = find_adapter(Lazy())
    with pytest.raises(RuntimeError, match=r"did not run its stage .body\.5.;"):
        adapter.run(Lazy(), torch.randn(1, 3, 32, 32), ["body.5"])


def test_first_tensor_refuses_what_holds_none():
    assert first_tensor((None, torch.ones(1))).item() == 1
    with pytest.raises(RuntimeError, match="got str"):
        first_tensor("no")
