"""Models by name, their labels, their files."""

import json

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import tiny_cnn, tiny_vit
from transformers import (
    AutoModelForImageClassification,
)
from transformers_models import HUGGING_FACE, hugging_face

import hetkd
from hetkd import Distiller, load_model
from hetkd.models import save_model
from hetkd.models.inputs import input_spec


def test_list_models():
    mobile = hetkd.list_models("timm:*mobile*")
    assert "timm:mobilenetv2_100" in mobile
    assert all(name.startswith("timm:") and "mobile" in name for name in mobile)
    both = hetkd.list_models("resnet18")
    assert both == ["timm:resnet18", "torchvision:resnet18"]
    assert len(hetkd.list_models("torchvision:*")) == 80
    assert load_model(both[1], pretrained=False).fc.out_features == 1000
    with pytest.raises(ValueError, match="did you mean 'mobilenetv2_100'"):
        hetkd.list_models("timm:mobilenetv2_1000")
    with pytest.raises(ValueError, match="unknown library of models 'tim': did you mean 'timm'"):
        hetkd.list_models("tim:*")


def test_torchvision_models_are_built_as_their_weights_want(monkeypatch):
    state = torchvision.models.googlenet(weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **options: state)
    assert load_model("torchvision:googlenet").transform_input, "its weights were not trained on ImageNet's mean"
    with torch.device("meta"):  # as large as it is
        student = load_model("torchvision:vit_h_14", pretrained=False)
        assert input_spec(student).size == (224, 224)
        large = load_model("torchvision:vit_h_14", pretrained=False, image_size=518)
        state = large.state_dict()
        assert input_spec(load_model("torchvision:vit_h_14")).size == (518, 518)


NAMES = {0: "cat", 1: "dog", 2: "fox", 3: "owl", 4: "elk"}


def labelled(model_type: int):
    model = hugging_face(*HUGGING_FACE[model_type][:2])
    model.config.id2label = NAMES
    model.config.label2id = {name: index for index, name in NAMES.items()}
    return model


def test_hugging_face_labels_go_from_the_teacher_to_the_saved_student(tmp_path):
    labelled(0).save_pretrained(tmp_path / "teacher")
    hugging_face("resnet", HUGGING_FACE[7][1]).save_pretrained(tmp_path / "student")
    d = Distiller(f"hf:{tmp_path / 'teacher'}", f"hf:{tmp_path / 'student'}", "kd", input_size=64)
    d.save_student(tmp_path / "out")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == NAMES
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["4"] == "elk"


def test_hugging_face_labels_of_a_loaded_student_stay(tmp_path):
    labelled(7).save_pretrained(tmp_path / "student")
    student = load_model(f"hf:{tmp_path / 'student'}")
    Distiller(tiny_vit(num_classes=5), student, "kd", input_size=64).save_student(tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == NAMES


def test_sharded_safetensors_are_read_and_pickles_are_not(tmp_path):
    model = hugging_face(*HUGGING_FACE[0][:2])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load_model(f"hf:{tmp_path / 'sharded'}")(x).logits, model(x).logits)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"could not load hf:.*pickled"):
        load_model(f"hf:{tmp_path / 'pickled'}")


def test_remote_code_is_refused(tmp_path):
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match="code of its own, which hetkd does not run"):
        load_model(f"hf:{tmp_path}")


def test_siglip2_takes_images_through_its_adapter():
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = hugging_face("siglip2", {"vision_config": {**vision, "num_patches": 16, "patch_size": 16}})
    d = Distiller(model, tiny_cnn(num_classes=5), "sfkd", input_size={"teacher": 64, "student": 64})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    inputs = processor(list(images), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(d(images).teacher_logits, expected, rtol=1e-4, atol=1e-5)
    assert d.plan.rows[0].teacher_shape == (32, 4, 4)


def test_an_error_of_the_model_itself_is_not_taken_for_the_network(monkeypatch):
    def build(name, **options):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(timm, "create_model", build)
    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):
        load_model("timm:test_resnet", pretrained=True)


@pytest.mark.parametrize("saved", [7, 0])
def test_a_head_of_another_size_or_none_is_replaced_and_said(saved, tmp_path, capsys):
    model = tiny_vit(num_classes=saved)
    save_model(model, tmp_path / "w.safetensors")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    loaded = load_model("vit_tiny_patch16_224", num_classes=5, weights=tmp_path / "w.safetensors", **options)
    assert loaded.head.weight.shape == (5, 24)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    said = capsys.readouterr().out
    assert ("of 7 classes" if saved else "missing") in said
    assert "head of 5, is untrained" in said
    with pytest.raises(ValueError, match="does not fit"):
        load_model("vit_tiny_patch16_224", num_classes=5, weights=tmp_path / "w.safetensors", **{**options, "depth": 5})
