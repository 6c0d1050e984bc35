"""The recipe for segmenters, in its shortest form and on a folder."""

import json

import pytest
import segmentation
import torch
from PIL import Image


def test_dry_run(tmp_path, capsys):
    found = segmentation.main(["--dry-run", "--cpu", "--output", str(tmp_path)])
    assert set(found) >= {"miou", "pixel_accuracy", "iou/0"}
    assert json.loads((tmp_path / "runs.jsonl").read_text())["miou"] == found["miou"]
    assert "the teacher has a validation mIoU of" in capsys.readouterr().out


def test_a_folder_and_a_teacher_that_was_trained_before(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number, (image, mask) in enumerate(zip(*segmentation.stripes(8, (48, 64)), strict=True)):
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.webp", lossless=True)
            Image.fromarray(mask.to(torch.uint8).numpy()).save(tmp_path / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text("dark\ngrey\nbright\n")
    options = ["--data", str(tmp_path), "--teacher", "timm:test_efficientnet", "--student", "timm:test_resnet", "--cpu"]
    options += ["--size", "32", "64", "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8"]
    options += ["--output", str(tmp_path / "runs")]
    assert "iou/grey" in segmentation.main([*options, "--method", "ce"])
    assert "training the teacher" in capsys.readouterr().out
    segmentation.main([*options, "--method", "cwd", "--output", str(tmp_path / "runs")])
    assert "best.safetensors, trained before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a teacher of 3 classes, not 4: say --output"):
        segmentation.main([*options, "--classes", "4"])


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        segmentation.main([])
    assert "--data is needed, or --dry-run" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match="how many classes"):
        segmentation.main(["--data", str(tmp_path)])
