"""Data of every kind, accumulated, mixed, smoothed."""

import pytest
import timm
import timm.optim
import torch
from conftest import batch, tiny_cnn, tiny_vit
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image
from training_runs import QUIET, bright_or_dark, make

from hetkd import Distiller
from hetkd.data.images import UnreadableImage
from hetkd.training import TrainingOptions
from hetkd.training.batches import TargetMaker


def test_accumulated_gradients_equal_those_of_a_large_batch():
    data = bright_or_dark(32)
    weights = []
    for batch_size, accumulation in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        student = timm.create_model("test_convnext", num_classes=10, drop_path_rate=0.0)
        distiller = Distiller(tiny_vit(), student, "kd", input_size=64)
        distiller.fit(
            data, epochs=1, batch_size=batch_size, gradient_accumulation=accumulation, optimizer="sgd", lr=0.01, **QUIET
        )
        weights.append(distiller.student.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-4)


def test_label_smoothing_and_mixing_make_soft_labels():
    distiller = make("kd")
    images, labels = batch(4)
    smooth = TargetMaker(TrainingOptions(label_smoothing=0.1), distiller.classes)(images, labels)
    assert torch.equal(smooth[0], images)
    torch.testing.assert_close(smooth[1].sum(1), torch.ones(4))
    assert smooth[1].max().item() == pytest.approx(0.91)
    mixed_images, mixed = TargetMaker(TrainingOptions(mixup=1.0), distiller.classes)(
        (images * 255).to(torch.uint8), labels
    )
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    assert mixed_images.min() >= 0
    assert mixed_images.max() <= 1


def test_loaders_datasets_dicts_and_folders(tmp_path):
    images, labels = bright_or_dark(20)
    loader = DataLoader(TensorDataset(images, labels), batch_size=10)
    dicts = [{"image": Image.new("RGB", (40, 30), (10 * k, 0, 0)), "label": k} for k in range(10)]
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (50, 40), 40 * index).save(tmp_path / split / name / f"{index}.png")
    distiller = make("kd")
    distiller.fit(loader, loader, epochs=1, **QUIET)
    distiller.fit(dicts, dicts, epochs=1, batch_size=5, **QUIET)
    distiller.fit(tmp_path / "train", str(tmp_path / "val"), epochs=1, batch_size=4, num_workers=1, **QUIET)
    distiller.fit(((pair for pair in [(images, labels)])), epochs=1, scheduler="constant", **QUIET)


def test_one_channel_folder(tmp_path):
    for index in range(4):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (50, 40), (40 * index, 0, 0)).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    Distiller(None, tiny_cnn(in_chans=1), "ce", input_size=32).fit(tmp_path, epochs=1, batch_size=2, **QUIET)


class TestUnreadableImages:
    def folder(self, path) -> str:
        for index in range(16):
            (path / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 40, 40)).save(path / f"class{index % 2}" / f"{index:02}.png")
        (path / "class0" / "04.png").write_bytes(b"no picture")
        whole = (path / "class1" / "07.png").read_bytes()
        (path / "class1" / "07.png").write_bytes(whole[: len(whole) // 2])
        return str(path)

    def fit(self, folder, **options):
        distiller = Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32)
        return distiller.fit(folder, epochs=2, batch_size=8, cpu=True, **options)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_they_end_the_run_with_their_path(self, tmp_path, workers):
        with pytest.raises(UnreadableImage, match=r"class[01]/0[47]\.png cannot be read.*unreadable='skip'"):
            self.fit(self.folder(tmp_path), num_workers=workers, progress=False)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_or_they_are_skipped_counted_and_named(self, tmp_path, workers, capsys):
        result = self.fit(self.folder(tmp_path), num_workers=workers, unreadable="skip")
        assert result.history[-1]["unreadable_images"] == 2
        out = capsys.readouterr().out
        assert "2 images cannot be read and were skipped" in out
        assert "04.png" in out
        assert "07.png" in out
