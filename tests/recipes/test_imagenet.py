"""ImageNet's protocol, from folders and streams."""

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from running import RECIPES, finish, run

from hetkd.data.transforms import image_transform
from hetkd.models.inputs import InputSpec


@pytest.fixture
def tiny_imagenet(tmp_path, data_folder):
    """Four classes of six crops of real ImageNet images, and weights of a small teacher for them."""
    from hetkd.models import save_model

    archive = zipfile.ZipFile(next((data_folder / "imagenet_samples_1000").glob("*.zip")))
    pictures = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))][:4]
    for label, name in enumerate(pictures):
        with Image.open(archive.open(name)) as picture:
            for split, count in (("train", 6), ("val", 3)):
                (tmp_path / "data" / split / f"n{label}").mkdir(parents=True)
                for index in range(count):
                    crop = picture.convert("RGB").crop((10 * index, 0, 10 * index + 150, 150))
                    crop.save(tmp_path / "data" / split / f"n{label}" / f"{index}.jpg")
    archive.close()
    save_model(timm.create_model("test_vit", num_classes=4), tmp_path / "teacher.safetensors")
    return tmp_path


IMAGENET = ("--teacher", "timm:test_vit", "--teacher-weights", "teacher.safetensors", "--data", "data")


def in_two_processes(script: str, *words: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = finish(
        [*command, str(RECIPES / script), *words],
        200,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    return done.stdout


def write_shards(folder: Path, data: Path) -> None:
    """Packs the images of a folder into two WebDataset shards a split."""
    folder.mkdir()
    for split in ("train", "val"):
        files = sorted((data / split).glob("*/*.jpg"))
        for shard in range(2):
            with tarfile.open(folder / f"tiny-{split}-{shard}.tar", "w") as archive:
                for path in files[shard::2]:
                    key = f"{path.parent.name}-{path.stem}"
                    archive.add(path, f"{key}.jpg")
                    label = path.parent.name.removeprefix("n").encode()
                    member = tarfile.TarInfo(f"{key}.cls")
                    member.size = len(label)
                    archive.addfile(member, io.BytesIO(label))


@pytest.mark.slow
def test_imagenet_from_a_stream_in_two_processes(tiny_imagenet):
    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    words = (*IMAGENET[:-1], "wds:shards", "--images", "24", "--classes", "4", "--student", "timm:test_resnet")
    short = ("--batch-size", "4", "--workers", "1", "--epochs", "1", "--output", "out")
    in_two_processes("imagenet_sfkd.py", *words, *short, cwd=tiny_imagenet)
    record = json.loads((tiny_imagenet / "out" / "history.json").read_text())[0]
    top1 = record["top1"] * 12 / 100
    assert top1 == pytest.approx(round(top1), abs=1e-3), "all 12 validation images count, once each"
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert (settings["processes"], settings["effective_batch_size"]) == (2, 8)


def test_stream_is_the_same_again_and_another_in_the_next_epoch(tiny_imagenet, monkeypatch):
    from hetkd.data import streams

    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    spec = InputSpec(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    transform = image_transform(spec, (32, 32), train=True)

    def batches(epoch: int, rank: int = 0, images: int = 24) -> list:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = streams.open_streams(f"wds:{tiny_imagenet / 'shards'}")["train"]
        loader = streams.TrainingStream(stream, transform, batch_size=4, workers=0, images=images, seed=0)
        loader.set_epoch(epoch)
        return list(loader)

    first = batches(0)
    assert len(first) == 3
    torch.testing.assert_close(batches(0), first)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, batches(1), strict=True))
    labels = torch.cat([y for rank in (0, 1) for _, y in batches(0, rank)])
    assert labels.bincount().tolist() == [6, 6, 6, 6], "the processes share the images out"
    assert len(batches(0, images=48)) == 6, "a stream that ends early starts again"


def test_stream_without_a_whole_batch_ends(tiny_imagenet):
    from hetkd.data import streams

    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    stream = streams.open_streams(f"wds:{tiny_imagenet / 'shards'}")["train"]
    transform = image_transform(InputSpec(3, (8, 8), (0.5,) * 3, (0.5,) * 3), (8, 8), train=True)
    loader = streams.TrainingStream(stream, transform, batch_size=16, workers=2, images=24, seed=0)
    with pytest.raises(ValueError, match="no loading process has 16 images"):
        list(loader)


def test_stream_refuses_what_it_cannot_know(tmp_path, capsys):
    import imagenet_sfkd

    from hetkd.data import streams

    with pytest.raises(SystemExit):
        imagenet_sfkd.parse_arguments(["--data", "wds:shards"])
    assert "a stream needs --images and --classes" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no shards \*train\*\.tar"):
        streams.open_streams(f"wds:{tmp_path}")


@pytest.mark.slow
def test_imagenet_in_two_processes_and_again(tiny_imagenet):
    words = (*IMAGENET, "--student", "timm:test_resnet", "--batch-size", "4", "--workers", "0", "--output", "out")
    for _ in range(2):  # the second time there is nothing left to do
        out = in_two_processes("imagenet_sfkd.py", *words, "--epochs", "2", cwd=tiny_imagenet)
    assert "going on after epoch 2" in out
    history = json.loads((tiny_imagenet / "out" / "history.json").read_text())
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert len(history) == 2
    assert settings["effective_batch_size"] == 8
    assert (settings["optimizer"], settings["lr"], settings["scheduler"]) == ("sgd", 0.1, "step")


@pytest.mark.slow
def test_imagenet_dry_run_and_the_protocol_of_transformers(tiny_imagenet):
    words = (*IMAGENET, "--student", "timm:test_vit2", "--batch-size", "4")
    out = run("imagenet_sfkd.py", *words, "--dry-run", cwd=tiny_imagenet)
    assert "24 training images, 300 epochs" in out
    assert "effective batch 4 = 4 images x 1 processes x 1 accumulated; the learning rate 0.0005" in out
    assert "6 steps an epoch, 1,800 in all" in out
    assert "method SFKD" in out
    assert not (tiny_imagenet / "runs").exists()
    run("imagenet_sfkd.py", *words, "--epochs", "1", "--workers", "0", "--output", "out", cwd=tiny_imagenet)
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert (settings["optimizer"], settings["mixup"], settings["ema"]) == ("adamw", 0.8, 0.99996)
    assert "RandAugment" in settings["augment"]
