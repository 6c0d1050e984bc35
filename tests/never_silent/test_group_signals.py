"""Signals to a whole process group, as clusters send them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from running import end, finish
from torch.utils.data import DataLoader, Dataset

from hetkd.training.signals import quietly, with_quiet_workers

GROUP = """
import sys, timm, torch
from pathlib import Path
from hetkd import Distiller
folder = Path(sys.argv[1])
model = timm.create_model("test_resnet", num_classes=2)
Distiller(None, model, "ce", input_size=32).fit(
    folder / "data", epochs=200, batch_size=4, num_workers=2, output_dir=folder / "run", cpu=True, resume=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(tmp_path, name):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(tmp_path / "data" / label / f"{index}.png")
    command = [sys.executable, "-W", "ignore", "-c", GROUP, str(tmp_path)]
    checkpoints = tmp_path / "run" / "checkpoints"
    run = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 100
        while not any(checkpoints.glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        before = max(checkpoints.glob("step-*"))
        os.killpg(run.pid, getattr(signal, name))
        if name == "SIGUSR1":
            time.sleep(3)
            os.killpg(run.pid, signal.SIGTERM)
        out = run.communicate(timeout=90)[0]
    finally:
        end(run)
    assert run.returncode == 128 + signal.SIGTERM, out[-2000:]
    assert "Traceback" not in out
    assert max(checkpoints.glob("step-*")) > before


KEPT = """
import sys, timm, torch
from hetkd import Distiller

class Breaks(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if index == 9:
            raise ArithmeticError("in a loading process")
        return torch.rand(3, 32, 32), index % 2

distiller = Distiller(None, timm.create_model("test_resnet", num_classes=2), "ce", input_size=32)
try:
    distiller.fit(Breaks(), epochs=1, batch_size=4, num_workers=2, cpu=True, progress=False)
except ArithmeticError as error:
    kept = error  # and by its traceback the loading processes
"""


@pytest.mark.slow
def test_an_error_that_is_kept_does_not_keep_the_interpreter_from_ending():
    done = finish([sys.executable, "-W", "ignore", "-c", KEPT], 90)
    assert done.returncode == 0, done.stderr


class Stuck(Dataset):
    """Its second image never comes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(1000 * index)
        return index


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_stuck_loading_process_ends_with_the_run(start):
    batches = quietly(with_quiet_workers(DataLoader(Stuck(), num_workers=1, multiprocessing_context=start)))
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    worker.join(20)
    assert worker.exitcode in (0, -signal.SIGTERM)
