"""Checkpoints of a run: best and last student, and everything that is needed to go on."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hetkd.files import write_atomically, write_json
from hetkd.models import save_model

BEST = "best.safetensors"
LAST = "last.safetensors"
HISTORY = "history.json"
SETTINGS = "settings.json"
_STATE = "state.pt"


class RunFolder:
    """The output folder of one run.

    It holds ``best.safetensors`` and ``last.safetensors`` (plain students), ``history.json``,
    ``settings.json``, ``plan.txt``, and in ``checkpoint/`` the state of the training after its
    last whole epoch.

    Args:
        path: The folder.
        resume: Whether a run in it goes on.

    Raises:
        FileExistsError: If it holds a run and ``resume`` is false.
    """

    def __init__(self, path: str | Path, *, resume: bool) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint"
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output_dir={str(path)!r} is a file.")
        if (self.path / SETTINGS).exists() and not resume:
            raise FileExistsError(
                f"output_dir={str(path)!r} holds another run: go on with resume=True, or choose another folder."
            )

    def start(self, settings: dict[str, Any], plan: str) -> None:
        """Writes what is known before the training."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS, settings)
        write_atomically(self.path / "plan.txt", lambda temporary: _write_text(temporary, plan + "\n"))

    def save_student(self, student: nn.Module, name: str) -> None:
        """Saves a plain student under ``BEST`` or ``LAST``."""
        save_model(student, self.path / name)

    def save_history(self, history: list[dict[str, float]]) -> None:
        """Writes the history so far."""
        write_json(self.path / HISTORY, history)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces the state of the training by a newer one; at every moment one of them is whole."""
        self.checkpoint.mkdir(exist_ok=True)
        write_atomically(self.checkpoint / _STATE, lambda temporary: torch.save(state, temporary))

    def load_settings(self) -> dict[str, Any] | None:
        """Returns the settings of the run in this folder, or ``None`` if there is none yet."""
        path = self.path / SETTINGS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def load_state(self) -> dict[str, Any] | None:
        """Returns the state of the training, or ``None`` if there is none yet.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.checkpoint / _STATE
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise ValueError(f"{path} is damaged ({error}); remove it to start again.") from error
        return state


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
