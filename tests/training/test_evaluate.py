"""Evaluation of a student."""

import pytest
import torch
from conftest import batch
from training_runs import make


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
