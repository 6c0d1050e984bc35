"""Recipes and launchers, run as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from conftest import REPOSITORY

RECIPES = REPOSITORY / "recipes"


def finish(command: list, timeout: float, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` that on time-out ends the processes of its process, too, and shows where they hung."""
    options["env"] = {**(options.get("env") or os.environ), "PYTHONFAULTHANDLER": "1"}  # tracebacks at SIGABRT
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for each in family(process):
            each.send_signal(signal.SIGABRT)
        time.sleep(5)
        end(process)
        pytest.fail(f"{command} did not end within {timeout} s: {process.communicate(timeout=60)[1][-20000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def end(process: subprocess.Popen) -> None:
    """Kills a process and all that it started, in other sessions, too."""
    for each in family(process):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns a process and all that it started; none if it has ended."""
    try:
        return [(root := psutil.Process(process.pid)), *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run(recipe: str, *arguments: str, cwd) -> str:
    done = finish(
        [sys.executable, str(RECIPES / recipe), *arguments], 280, cwd=cwd, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    return done.stdout


def tiny_data(name="tiny", classes=4, pixels=32, count=48, channels=3):
    """Images of as many brightnesses as classes."""
    from hetkd.data import ImageData

    labels = torch.arange(count) % classes
    noise = torch.rand(count, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    images = (255 * (labels[:, None, None, None] / classes + noise / 8)).to(torch.uint8)
    return ImageData(name, (images, labels), (images[:16], labels[:16]), classes)
