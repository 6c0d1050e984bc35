"""Evaluation of a student."""

import pytest
import torch
from conftest import batch, tiny_cnn
from training_runs import make

from hetkd import Distiller


def test_evaluate_equals_a_computation_by_hand():
    images, labels = batch(23)
    distiller = make("kd")
    metrics = distiller.evaluate((images, labels), batch_size=7)
    with torch.no_grad():
        logits = distiller.eval().predict(images)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * top5)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_samples_that_only_their_own_collate_understands_are_evaluated():
    images, labels = batch(6)
    rows = [
        (image, int(label), f"{number}.png") for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]

    def collate(samples):
        return torch.stack([x for x, _, _ in samples]), torch.tensor([y for _, y, _ in samples])

    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collate)
    distiller = make("kd")
    assert distiller.evaluate(loader) == pytest.approx(distiller.evaluate((images, labels)), rel=1e-5)


def test_a_stream_is_evaluated_once_and_from_its_beginning():
    images, labels = batch(6)

    class Stream(torch.utils.data.IterableDataset):
        began = 0

        def __iter__(self):
            Stream.began += 1
            return iter(zip(images, labels, strict=True))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=3)
    distiller = make("kd")
    distiller.fit((images, labels), loader, epochs=1, batch_size=3, progress=False, cpu=True)
    assert Stream.began == 1


def test_a_teacher_keeps_its_own_order_where_its_logits_are_not_compared(tmp_path):
    from PIL import Image

    for name, level in (("a", 20), ("b", 230)):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / name / f"{index}.png")
    teacher = Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32)
    teacher.fit(tmp_path, epochs=1, batch_size=4, progress=False, cpu=True)
    teacher.class_names = ["b", "a"]  # as if the rows of its head were swapped
    teacher.save_student(tmp_path.parent / "teacher.safetensors")
    distiller = Distiller(str(tmp_path.parent / "teacher.safetensors"), tiny_cnn(num_classes=2), "rsd", input_size=32)
    before = distiller.evaluate(tmp_path, role="teacher")
    distiller.fit(tmp_path, epochs=1, batch_size=4, progress=False, cpu=True)
    assert distiller.evaluate(tmp_path, role="teacher") == before
