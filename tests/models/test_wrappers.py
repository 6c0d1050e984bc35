"""Models inside DDP, torch.compile and PEFT."""

import copy

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from safetensors.torch import load_file
from torch import nn
from transformers_models import HUGGING_FACE, hugging_face

from hetkd import Distiller


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
