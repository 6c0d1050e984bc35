"""Taps of every family and library: right grids, right logits, one forward."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from conftest import batch, tiny_cnn, tiny_vit
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hetkd import Distiller, HookAdapter, list_adapters, load_model, register_adapter
from hetkd.features.grid import common_grid, to_grid, tokens_to_map
from hetkd.features.hooks import first_tensor
from hetkd.features.pairing import choose_stages
from hetkd.features.probe import probe
from hetkd.features.registry import adapters, find_adapter
from hetkd.spectral import dwt2

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
    stages, classes, _ = probe(adapter, model, x[:1])
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


TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
}
SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "image_size": 64, "window_size": 2}
HUGGING_FACE = [
    ("vit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("deit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("beit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("dinov2", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("dinov2_with_registers", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("swin", SWIN, "Swin", [16, 8, 4, 2]),
    ("swinv2", SWIN, "Swin", [16, 8, 4, 2]),
    ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "CNN", [16, 8, 4, 2]),
    ("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "CNN", [16, 8, 4, 2]),
    ("mobilenet_v2", {"depth_multiplier": 0.35}, "CNN", [16, 8, 4, 2]),
]


def hugging_face(model_type: str, options: dict, head: bool = True) -> nn.Module:
    config = AutoConfig.for_model(model_type, **options)
    config.architectures = []  # transformers 5 iterates over it
    config.num_labels = 5
    return (AutoModelForImageClassification if head else AutoModel).from_config(config).eval()


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


class OwnCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


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
    stages, classes, _ = probe(adapter, model, x)
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
    stages, _, _ = probe(find_adapter(googlenet), googlenet, torch.rand(2, 3, 64, 64))
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
    stages, _, _ = probe(find_adapter(model), model, x)
    assert torch.equal(find_adapter(model).run(model, x, [stages[-1].name]).logits, 3 * plain)


def test_a_model_compiled_in_place_is_tapped():
    student = OwnCNN()
    d = Distiller(tiny_vit(), student, "sfkd", input_size=32)
    student.compile(backend="eager")
    for _ in range(2):
        d(*batch()).loss.backward()
        assert d.predict(batch()[0]).shape == (8, 10)


def test_naming_a_module_leaves_rows_and_depths_as_they_were():
    def stages(*choices):
        d = Distiller(tiny_vit(depth=8), "test_resnet", "sfkd", stages=list(choices), input_size=64)
        return [(row.teacher, row.student) for row in d.plan.rows if row.stage != "logits"]

    extra = ("blocks.5.mlp", "layer1.0.conv1")
    assert stages(2, extra)[0] == stages(2)[0]
    assert stages("layer2", extra)[0] == stages("layer2")[0]
    assert stages(1, 2, extra)[:2] == stages(1, 2)


def test_timm_model_of_no_family_is_tapped_generically():
    model = tiny_cnn().eval()
    generic = adapters["generic"]()
    stages, classes, _ = probe(generic, model, torch.randn(1, 3, 64, 64))
    assert classes == 10
    assert [stage.height for stage in choose_stages(stages)] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("name", "pixels"),
    [(name, 64) for name in ("efficientnet_b0", "mobilenetv2_035", "resnet18", "resnetv2_18", "nf_resnet26")],
)
def test_the_last_stage_is_the_map_before_pooling(name, pixels):
    model = timm_model(name, pixels)
    x = torch.randn(2, 3, pixels, pixels)
    adapter = find_adapter(model)
    stages, _, _ = probe(adapter, model, x)
    features = adapter.run(model, x, [stages[-1].name])
    torch.testing.assert_close(features.maps[0].mean((2, 3)), features.pooled)


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
    stages, _, _ = probe(find_adapter(model), model, torch.rand(1, 3, 64, 64), ["layer4.0", "layer1.0", "maxpool"])
    names = [stage.name for stage in stages]
    assert names == ["act1", "maxpool", "layer1.0", "layer1", "layer2", "layer3", "layer4.0", "layer4"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_unwrapped(wrap, tmp_path):
    teacher, student = tiny_vit(), tiny_cnn()
    d = Distiller(wrap(teacher), wrap(student), "sfkd", input_size=64)
    assert d.teacher is teacher
    assert d.student is student
    d(*batch()).loss.backward()
    d.save_student(tmp_path / "student.safetensors")
    assert load_file(tmp_path / "student.safetensors").keys() == student.state_dict().keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_peft_models_are_tapped_inside_and_saved_as_adapters(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    base = hugging_face("vit", HUGGING_FACE[0][1])
    plain = copy.deepcopy(base)
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    d = Distiller(tiny_vit(num_classes=5), student, "sfkd", input_size=64)
    d(*batch(classes=5)).loss.backward()
    trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert all("lora" in name or "modules_to_save" in name for name in trained)
    torch.optim.SGD(d.parameters(), lr=1.0).step()
    d.save_student(tmp_path)
    d.eval()
    x = torch.rand(2, 3, 64, 64)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(again(x).logits, student(x).logits)


def test_a_model_without_spatial_features_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    sizes = {"teacher": 32, "student": 32}
    with pytest.raises(ValueError, match=r"no spatial features.*but SFKD compares feature maps: use method='kd'"):
        Distiller(model, tiny_cnn(), "sfkd", input_size=sizes)
    output = Distiller(model, tiny_cnn(), "kd", input_size=sizes)(*batch())
    assert output.terms.keys() == {"ce", "kd"}


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
        assert [row.teacher for row in distiller.plan.rows][:2] == ["body.1", "body.3"]
        with pytest.raises(ValueError, match="already registered"):
            register_adapter("test-own")
    finally:
        adapters._items.pop("test-own")
    with pytest.raises(ValueError, match="malformed"):
        register_adapter("Bad Name")
    with pytest.raises(TypeError, match="subclass"):
        register_adapter("not-an-adapter")(OwnCNN)


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


def test_tokens_to_map_drops_prefix_tokens_and_keeps_order():
    patches = torch.arange(6.0).reshape(1, 6, 1)
    tokens = torch.cat([torch.full((1, 2, 1), 99.0), patches], dim=1)
    expected = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(tokens_to_map(tokens, (32, 48), 16), expected)
    assert torch.equal(tokens_to_map(tokens, (32, 48)), expected)
    with pytest.raises(ValueError, match="do not hold"):
        tokens_to_map(tokens, (64, 64), 16)
    with pytest.raises(ValueError, match="do not form a grid"):
        tokens_to_map(torch.zeros(1, 3, 1), (16, 4800))


def test_what_inference_mode_saw_first_trains_later():
    x = torch.rand(2, 3, 22, 22, dtype=torch.float64)
    with torch.inference_mode():
        to_grid(x, (9, 9))
        dwt2(x, "db3", 1)
    x.requires_grad_()
    (to_grid(x, (9, 9)).sum() + dwt2(x, "db3", 1).low.square().sum()).backward()
    assert x.grad is not None


@pytest.mark.parametrize("sizes", [((14, 14), (16, 16)), ((7, 9), (4, 4)), ((5, 5), (8, 3))])
def test_to_grid_is_the_antialiased_interpolation_and_compiles(sizes):
    x = torch.randn(2, 3, *sizes[0], dtype=torch.float64)
    expected = F.interpolate(x, sizes[1], mode="bilinear", antialias=True)
    torch.testing.assert_close(to_grid(x, sizes[1]), expected, atol=1e-12, rtol=1e-12)
    torch._dynamo.reset()  # else sizes that were others before become symbols
    compiled = torch.compile(lambda x: to_grid(x, sizes[1]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.float()), expected.float())


def test_grids():
    assert common_grid((14, 14), (7, 7), 4) == (8, 8)
    assert common_grid((56, 28), (64, 64), 4) == (16, 16)
    assert common_grid((7, 5), (9, 9), 1) == (7, 5)
    x = torch.randn(2, 3, 7, 7)
    assert to_grid(x, (7, 7)) is x
    constant = torch.full((1, 1, 14, 14), 2.5)
    torch.testing.assert_close(to_grid(constant, (8, 8)), torch.full((1, 1, 8, 8), 2.5))
