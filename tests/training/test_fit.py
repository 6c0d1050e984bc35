"""Training end to end on small real models."""

import copy
import json

import pytest
import timm
import timm.optim
import torch
from accelerate.tracking import GeneralTracker
from conftest import batch, tiny_cnn, tiny_vit
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms.functional import to_pil_image
from training_runs import QUIET, bright_or_dark, make

from hetkd import Distiller


def test_learns_and_reports(tmp_path, capsys):
    data = bright_or_dark(80)
    distiller = make("ce")
    before = distiller.evaluate(data)
    result = distiller.fit(data, data, epochs=6, output_dir=tmp_path / "run", batch_size=16, lr=3e-3, cpu=True)
    assert len(result.history) == 6
    assert result.best["top1"] > before["top1"] + 20
    assert result.best["top1"] == max(record["top1"] for record in result.history)
    assert {"epoch", "lr", "train/ce", "images_per_second", "seconds", "top1", "top5", "loss"} <= set(result.history[0])
    assert result.history[0]["lr"] > result.history[-1]["lr"]
    out = capsys.readouterr().out
    assert "epoch   6/6" in out
    assert "val top-1" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best.safetensors",
        "best.json",
        "best.md",
        "last.json",
        "last.md",
        "history.csv",
        "last.safetensors",
        "history.json",
        "settings.json",
        "plan.txt",
        "checkpoints",
    }
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result.history
    best = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "run" / "best.safetensors"))
    assert make(
        "ce",
    ).evaluate(data) != distiller.evaluate(data)
    again = Distiller(None, best, "ce", input_size=64).evaluate(data)
    assert again["top1"] == pytest.approx(result.best["top1"])
    assert distiller.evaluate(data)["top1"] == pytest.approx(result.history[-1]["top1"])


def test_same_seed_same_run():
    runs = []
    for _ in range(2):
        distiller = make()
        distiller.fit(bright_or_dark(32), epochs=2, batch_size=8, **QUIET)
        runs.append(distiller.student.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize(
    "options", [{"mixed_precision": "bf16"}, {"clip_grad": 1.0, "label_smoothing": 0.1}, {"cutmix": 1.0, "mixup": 0.8}]
)
def test_options_train_with_finite_terms(options):
    result = make().fit(
        bright_or_dark(32), epochs=1, batch_size=16, warmup_epochs=0.5, optimizer="sgd", **options, **QUIET
    )
    assert all(value == value for value in result.history[0].values())


def test_a_polynomial_schedule_is_a_straight_line():
    result = make("kd").fit(bright_or_dark(8), epochs=4, batch_size=2, lr=1e-3, scheduler="poly", **QUIET)
    assert [record["lr"] for record in result.history][:2] == pytest.approx([1e-3 * 13 / 16, 1e-3 * 9 / 16], rel=1e-2)


def test_a_stream_trains_where_nothing_needs_its_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*bright_or_dark(16), strict=True)

    result = make("kd").fit(DataLoader(Stream(), batch_size=8), epochs=1, scheduler="constant", **QUIET)
    assert result.history[0]["train/kd"] > 0


def test_a_refused_run_leaves_the_distiller_as_it_was():
    distiller, (images, labels) = make("sfkd"), bright_or_dark(9)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    with pytest.raises(ValueError, match="last batch of train has one image"):
        distiller.fit(loader, epochs=1, mixed_precision="bf16", **QUIET)
    assert distiller(images, labels).student_logits.dtype == torch.float32


def test_ema_ends_in_the_student():
    data = bright_or_dark(32)
    plain, averaged = make("ce"), make("ce")
    plain.fit(data, epochs=2, batch_size=8, **QUIET)
    result = averaged.fit(data, data, epochs=2, batch_size=8, ema=0.99, **QUIET)
    assert not torch.equal(plain.student.fc.weight, averaged.student.fc.weight)
    assert averaged.evaluate(data)["top1"] == pytest.approx(result.history[-1]["top1"])


def test_weight_decay_spares_what_the_student_says():
    distiller = Distiller(tiny_cnn(), tiny_vit(), "kd")
    assert {"student.pos_embed", "student.cls_token"} <= distiller.no_weight_decay()


def test_a_frozen_student_is_refused_by_fit_and_can_be_evaluated():
    student = tiny_cnn().requires_grad_(False)
    d = Distiller(tiny_vit(), student, "kd", input_size=32)
    data = batch(8, 32)
    assert 0 <= d.evaluate(data)["top1"] <= 100
    with pytest.raises(ValueError, match=r"frozen: call student.requires_grad_\(True\)"):
        d.fit(data, epochs=1, batch_size=4)


class TestWithoutLabels:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))

    def distiller(self, **options) -> Distiller:
        return Distiller(tiny_vit(), tiny_cnn(), "rsd", ce_weight=0.0, input_size=32, **options)

    def as_folder(self, folder) -> str:
        folder.mkdir()
        for index, image in enumerate(self.images):
            to_pil_image(image).save(folder / f"{index}.png")
        return str(folder)

    @pytest.mark.parametrize("kind", ["tensor", "dataset", "loader", "folder"])
    def test_images_alone_train_a_student(self, kind, tmp_path):
        data = {
            "tensor": lambda: self.images,
            "dataset": lambda: [to_pil_image(image) for image in self.images],
            "loader": lambda: DataLoader(TensorDataset(self.images), batch_size=8),
            "folder": lambda: self.as_folder(tmp_path / "images"),
        }[kind]()
        distiller = self.distiller()
        before = copy.deepcopy(distiller.student.state_dict())
        result = distiller.fit(data, epochs=1, batch_size=8, progress=False)
        assert result.history[0]["train/rsd.pooled"] > 0
        assert any(not torch.equal(before[name], x) for name, x in distiller.student.state_dict().items())

    def test_cross_entropy_without_labels_is_refused(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32)
        with pytest.raises(ValueError, match="use ce_weight=0"):
            distiller.fit(self.images, epochs=1, batch_size=8, progress=False)
        with pytest.raises(ValueError, match="need labels"):
            self.distiller().fit(self.images, epochs=1, batch_size=8, mixup=0.2, progress=False)
        labelled = self.images, torch.arange(len(self.images)) % 10
        with pytest.raises(ValueError, match="leave val out"):
            distiller.fit(labelled, self.images, epochs=1, batch_size=8, progress=False)


def test_out_of_memory_names_the_batch_and_what_to_do():
    distiller = make("kd")

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    distiller.method.forward = too_large
    with pytest.raises(torch.OutOfMemoryError, match="16 images does not fit in memory: batch_size=8 with"):
        distiller.fit(bright_or_dark(32), epochs=1, batch_size=16, **QUIET)


def test_trackers_get_settings_and_every_epoch(tmp_path):
    class Notes(GeneralTracker):
        name = "notes"
        requires_logging_directory = False
        settings, records = {}, []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.settings.update(values)

        def log(self, values, step, **kwargs):
            self.records.append((step, values))

    make("kd").fit(bright_or_dark(32), epochs=2, batch_size=16, trackers=[Notes()], **QUIET)
    assert Notes.settings["effective_batch_size"] == 16
    assert [step for step, _ in Notes.records] == [1, 2]
    assert all(values["train/kd"] > 0 for _, values in Notes.records)
    with pytest.raises(ValueError, match="'tensorbord', which is not installed or unknown"):
        make("kd").fit(bright_or_dark(16), epochs=1, trackers=["tensorbord"], **QUIET)
    with pytest.raises(TypeError, match="must be a list"):
        make("kd").fit(bright_or_dark(16), epochs=1, trackers="wandb", **QUIET)
