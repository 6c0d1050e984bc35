"""Signs of life where there is no terminal."""

import csv
import json

import torch
from conftest import tiny_cnn

from hetkd import Distiller
from hetkd.training import progress as module
from hetkd.training.progress import TrainingProgress


def test_without_a_terminal_there_is_a_line_a_minute(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with TrainingProgress(3, 100, 0, enabled=True) as progress:
        for step in range(1, 151):
            now[0] += 2.0
            progress.step()
            if step % 10 == 0:
                progress.show((step - 1) // 100, {"ce": 2.5}, 320.0)
    estimate, *lines = capsys.readouterr().out.splitlines()
    assert estimate == "an epoch will take about 3 min 20 s, 10 min 0 s for 3, without validation"
    assert len(lines) == 5
    assert lines[0] == "epoch   1/3  step 30/100  ce 2.500  320 images/s  9 min 0 s left"
    assert lines[3].startswith("epoch   2/3  step 20/100")


def test_history_is_a_table_too(tmp_path):
    data = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    distiller = Distiller(None, tiny_cnn(num_classes=4), "ce", input_size=32)
    distiller.fit(data, data, epochs=2, batch_size=4, output_dir=tmp_path, progress=False)
    history = json.loads((tmp_path / "history.json").read_text())
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history
