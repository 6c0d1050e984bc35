"""A Hugging Face model into a CNN."""

import sys

import pytest
import timm
import torch
from PIL import Image
from running import RECIPES, finish
from safetensors.torch import load_file


@pytest.mark.parametrize("classes", [2, 5])
def test_hf_to_cnn_packs_what_timm_loads(tmp_path, monkeypatch, capsys, classes):
    import hf_to_cnn
    import huggingface_hub
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=classes,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), (60 * index, 0, 0)).save(tmp_path / "photos" / split / name / f"{index}.png")
    uploads = []

    class Hub:
        def create_repo(self, *arguments, **options):
            uploads.append((arguments, options))

        def upload_folder(self, **options):
            uploads.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ["--teacher", str(tmp_path / "vit"), "--student", "test_resnet", "--dataset", str(tmp_path / "photos")]
    short = [
        "--pixels",
        "64",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    hub = ["--push-to-hub", "me/cnn"] if classes == 2 else []
    monkeypatch.setattr(sys, "argv", ["hf_to_cnn.py", *words, *short, *hub])
    hf_to_cnn.main()
    model = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True)
    trained = load_file(tmp_path / "out" / "run" / "best.safetensors")
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| classes | 2: cat, dog |" in card
    assert "| input | 64 x 64 pixels" in card
    assert model.pretrained_cfg["input_size"] == [3, 64, 64]
    assert len(uploads) == (2 if classes == 2 else 0)
    assert ("features teach, its logits do not" in capsys.readouterr().out) == (classes == 5)


@pytest.mark.slow
def test_errors_are_lines_and_no_tracebacks(tmp_path):
    words = ["--teacher", str(tmp_path / "none"), "--dataset", str(tmp_path)]
    done = finish([sys.executable, str(RECIPES / "hf_to_cnn.py"), *words], 100, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hf_to_cnn.py: ")
    assert "Traceback" not in done.stderr
