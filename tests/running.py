"""Recipes, run as a user runs them."""

import os
import subprocess
import sys

import torch
from conftest import REPOSITORY

RECIPES = REPOSITORY / "recipes"


def run(recipe: str, *arguments: str, cwd) -> str:
    command = [sys.executable, str(RECIPES / recipe), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=cwd, env={**os.environ, "COLUMNS": "160"}
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
