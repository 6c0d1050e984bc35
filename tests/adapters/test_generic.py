"""Models that no family knows, and adapters of one's own."""

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from torch import nn
from transformers_models import OwnCNN

from hetkd import Distiller, HookAdapter, list_adapters, load_model, register_adapter
from hetkd.features.pairing import choose_stages
from hetkd.features.probe import probe
from hetkd.features.registry import adapters, find_adapter


class OwnChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((1, 2)))


class OwnTokens(OwnChannelsLast):
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], x], dim=1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize(
    ("model", "grids"),
    [(OwnCNN(), [(16, 24), (8, 12), (4, 6)]), (OwnChannelsLast(), [(8, 12)] * 4), (OwnTokens(), [(8, 12)] * 4)],
)
def test_generic_finds_stages_of_any_layout(model, grids):
    model.eval()
    adapter = find_adapter(model)
    x = torch.randn(2, 3, 32, 48)
    stages, classes, *_ = probe(adapter, model, x)
    assert adapter.family == "other"
    assert classes == 10
    assert [stage.grid for stage in choose_stages(stages)] == grids
    assert torch.equal(adapter.run(model, x, [stages[-1].name]).logits, model(x))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out))
        self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, 2), nn.BatchNorm2d(out))

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


class OwnResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2, self.b3 = Residual(3, 8), Residual(8, 16), Residual(16, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return {"logits": self.head(self.b3(self.b2(self.b1(x))).mean((2, 3)))}


def test_generic_takes_blocks_not_their_branches():
    d = Distiller(tiny_vit(), OwnResNet(), "sfkd", input_size=32)
    assert [stage.name for stage in d.taps["student"].stages] == ["b1", "b2", "b3"]
    assert d.classes == 10
    googlenet = load_model("torchvision:googlenet", pretrained=False, num_classes=10, init_weights=False)
    stages, *_ = probe(find_adapter(googlenet), googlenet, torch.rand(2, 3, 64, 64))
    assert [(s.name, s.channels) for s in choose_stages(stages)][1:] == [
        ("inception3b", 480),
        ("inception4e", 832),
        ("inception5b", 1024),
    ]


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


def test_generic_looks_into_a_model_behind_a_normalisation():
    vit = tiny_vit()
    d = Distiller(nn.Sequential(Normalize(), vit), tiny_cnn(), "sfkd", input_size={"teacher": 32, "student": 64})
    names = [row.teacher for row in d.plan.rows if row.teacher]
    assert all(name.startswith("1.") for name in names)
    assert d.plan.rows[0].teacher_shape == (24, 4, 4)


def test_generic_refuses_layouts_that_mix_images():
    class SequenceFirst(OwnChannelsLast):
        def forward(self, x):
            x = self.stem(x).flatten(2).permute(2, 0, 1)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x.mean(0))

    d = Distiller(SequenceFirst(), tiny_cnn(), "sfkd", input_size={"teacher": 32, "student": 64})
    assert [stage.name for stage in d.taps["teacher"].stages] == ["stem"]


def test_overwritten_outputs_are_no_stages():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    d = Distiller(tiny_vit(), model, "sfkd", input_size=32)
    assert [stage.name for stage in d.taps["student"].stages] == ["0.0", "0.2", "1.0", "1.2"]
    with pytest.raises(ValueError, match=r"overwrites the output of '1.1' in place"):
        Distiller(tiny_vit(), model, "sfkd", stages=["1.1"], input_size=32)


def test_a_timm_subclass_with_a_forward_of_its_own_runs_it():
    class Tripled(type(tiny_cnn())):
        def forward(self, x):
            return 3 * super().forward(x)

    model = tiny_cnn().eval()
    x = torch.rand(2, 3, 64, 64)
    plain = model(x)
    model.__class__ = Tripled
    stages, *_ = probe(find_adapter(model), model, x)
    assert torch.equal(find_adapter(model).run(model, x, [stages[-1].name]).logits, 3 * plain)


def test_a_model_compiled_in_place_is_tapped():
    student = OwnCNN()
    d = Distiller(tiny_vit(), student, "sfkd", input_size=32)
    student.compile(backend="eager")
    for _ in range(2):
        d(*batch()).loss.backward()
        assert d.predict(batch()[0]).shape == (8, 10)


def test_timm_model_of_no_family_is_tapped_generically():
    model = tiny_cnn().eval()
    generic = adapters["generic"]()
    stages, classes, *_ = probe(generic, model, torch.randn(1, 3, 64, 64))
    assert classes == 10
    assert [stage.height for stage in choose_stages(stages)] == [16, 8, 4, 2]


def test_a_model_without_spatial_features_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    sizes = {"teacher": 32, "student": 32}
    with pytest.raises(ValueError, match=r"no spatial features.*but SFKD compares feature maps: use method='kd'"):
        Distiller(model, tiny_cnn(), "sfkd", input_size=sizes)
    output = Distiller(model, tiny_cnn(), "kd", input_size=sizes)(*batch())
    assert output.terms.keys() == {"ce", "kd"}


def test_own_adapter_wins_and_is_listed():
    @register_adapter("test-own")
    class OwnAdapter(HookAdapter):
        family = "own"

        def accepts(self, model):
            return isinstance(model, OwnCNN)

        def stage_names(self, model, images):
            return ["body.1", "body.3"]

    try:
        assert "test-own" in list_adapters()
        assert find_adapter(OwnCNN()).family == "own"
        distiller = Distiller(OwnCNN(), tiny_cnn(), "sfkd", input_size={"teacher": 32, "student": 32})
        assert [stage.name for stage in distiller.taps["teacher"].listed] == ["body.1", "body.3"]
        with pytest.raises(ValueError, match="already registered"):
            register_adapter("test-own")
    finally:
        adapters._items.pop("test-own")
    with pytest.raises(ValueError, match="malformed"):
        register_adapter("Bad Name")
    with pytest.raises(TypeError, match="subclass"):
        register_adapter("not-an-adapter")(OwnCNN)
