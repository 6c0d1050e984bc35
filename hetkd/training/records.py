"""Records of runs, for comparisons: one JSON object a line, with settings and costs."""

import json
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from hetkd.distillation import Distillation
from hetkd.training.checkpoint import SETTINGS
from hetkd.training.run import FitResult
from hetkd.utils.files import write_text

Row = dict[str, Any]


def row_of(distillation: Distillation, result: FitResult, memory: "PeakMemory", about: Mapping[str, Any]) -> Row:
    """Return the line of one run: what was run (``about`` and all settings), its results, costs and machine."""
    history = result.history
    settings = {} if result.output_dir is None else json.loads((result.output_dir / SETTINGS).read_text())
    return {
        **about,
        "top1": history[-1]["top1"],
        "epochs": len(history),
        "seconds": sum(record["seconds"] for record in history),
        "images_per_second": statistics.median(record["images_per_second"] for record in history),
        "peak_memory_mb": memory.peak_mb,
        "added_parameters": distillation.plan.added_parameters,
        "settings": settings,
        "curve": [record["top1"] for record in history],
        "versions": {name: version(name) for name in ("hetkd", "torch", "timm", "accelerate")},
        "git_revision": git_revision(),
        "machine": machine(),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the runs that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all runs, one JSON object a line; the file is whole at every moment."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


class PeakMemory:
    """The most memory while a context lasts: on a GPU what PyTorch allocates, else what the whole process holds."""

    def __enter__(self) -> Self:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        from psutil import Process

        process = Process()
        while True:
            self.peak_mb = max(self.peak_mb, process.memory_info().rss / 1e6)
            if self._stop.wait(0.05):
                return

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if torch.cuda.is_available():
            self.peak_mb = torch.cuda.max_memory_allocated() / 1e6
        else:
            self._thread.join()


def git_revision() -> str | None:
    """Return the commit of the script that runs, marked if there are changes; ``None`` outside a repository."""
    folder = str(Path(sys.argv[0] or ".").resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Return the GPU's name, or processor and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
