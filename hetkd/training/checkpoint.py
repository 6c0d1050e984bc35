"""The output folder of a run: students, history, and checkpoints that are whole or not there."""

import csv
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hetkd.models.description import Description
from hetkd.models.weights import save_described, save_model
from hetkd.utils.files import checksum, output_folder, sync_folder, with_prefix, write_json, write_text

BEST = "best.safetensors"
LAST = "last.safetensors"
HISTORY = "history.json"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"


@dataclass
class Checkpoint:
    """Everything that a training needs to go on.

    Attributes:
        tensors: Weights, optimizer moments and other tensors, by name.
        values: All else, as JSON values.
        random: The random states of each process, by its rank.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    random: dict[int, dict[str, Tensor]]


class RunFolder:
    """The output folder of one run.

    It holds ``best.safetensors`` and ``last.safetensors`` (plain students, what they are beside them as JSON),
    ``history.json`` and ``history.csv``, ``settings.json``, ``plan.txt``, and in ``checkpoints/`` one folder a
    checkpoint: tensors as safetensors, the rest as JSON, and a manifest with a checksum of each file.

    Args:
        path: The folder.
        resume: Whether to go on with a run in it.
        keep_last: Number of checkpoints to keep.

    Raises:
        FileExistsError: If it holds a run and ``resume`` is false.
        ValueError: If the path is empty.
    """

    def __init__(self, path: str | Path, *, resume: bool, keep_last: int = 2) -> None:
        self.path, self.keep_last = output_folder(path), keep_last
        self.checkpoints = self.path / CHECKPOINTS
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output_dir={str(path)!r} is a file.")
        if (self.path / SETTINGS).exists() and not resume:
            raise FileExistsError(
                f"output_dir={str(path)!r} holds another run: go on with resume=True, or choose another folder."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; the lock of a run that crashed holds nobody back.

        Raises:
            FileExistsError: If another run writes there now.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(
                f"output_dir={str(self.path)!r} is in use by another run: wait for it, or choose another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def start(self, settings: dict[str, Any], plan: str) -> None:
        """Write settings and plan, and remove the leftovers of an interrupted write."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS, settings)
        write_text(self.path / "plan.txt", plan + "\n")
        for leftover in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(leftover)

    def try_out(self, student: nn.Module, state: Mapping[str, Any]) -> None:
        """Save a student and a state dict once, and remove them: what cannot be saved is found before the training.

        Raises:
            ValueError: If the state dict holds anything but tensors.
            OSError: If the folder cannot be written to.
        """
        other = [name for name, x in state.items() if not isinstance(x, Tensor)]
        if other:
            raise ValueError(
                f"{other[0]} holds a {type(state[other[0]]).__name__}, but checkpoints hold tensors only: remove "
                "get_extra_state from that module, or let it return a tensor."
            )
        with TemporaryDirectory(prefix=".trial-", dir=self.path) as folder:
            save_model(student, Path(folder) / LAST)
            save_file(with_prefix("", state), Path(folder) / _TENSORS)

    def save_student(self, student: nn.Module, name: str, description: Description) -> None:
        """Save a plain student under ``BEST`` or ``LAST``, with what is to be said of it."""
        save_described(student, self.path / name, description)

    def save_history(self, history: list[dict[str, float]]) -> None:
        """Write the history so far, as JSON and as a table."""
        write_json(self.path / HISTORY, history)
        columns = list(dict.fromkeys(name for record in history for name in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.path / "history.csv", table.getvalue())

    def load_settings(self) -> dict[str, Any] | None:
        """Return the settings of the run in this folder, or ``None`` if there is none yet."""
        path = self.path / SETTINGS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def open_checkpoint(self, number: int) -> Path:
        """Return a temporary folder for checkpoint ``number``; the same for every process."""
        temporary = self.checkpoints / f".{_name(number)}.tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        return temporary

    def save_random(self, number: int, rank: int, random: dict[str, Tensor]) -> None:
        """Write the random states of one process into the open checkpoint ``number``."""
        save_file(random, self.open_checkpoint(number) / _random_name(rank))

    def save_checkpoint(
        self, number: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int | None = None
    ) -> None:
        """Complete checkpoint ``number``, visible in one step, and then removes old ones except ``keep``."""
        temporary, final = self.open_checkpoint(number), self.checkpoints / _name(number)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _VALUES).write_text(json.dumps(values), encoding="utf-8")
        files = sorted(path for path in temporary.iterdir() if path.name != _MANIFEST)
        write_json(temporary / _MANIFEST, {path.name: _flushed_checksum(path) for path in files})
        sync_folder(temporary)
        if final.exists():  # a damaged one, or one of a run that went on from an older one
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(self.checkpoints)
        numbers = self._numbers()
        whole = [other for other in numbers if other <= number][-self.keep_last :]
        for other in set(numbers) - {*whole, keep}:  # old ones, and damaged ones that the run did not go on from
            shutil.rmtree(self.checkpoints / _name(other))

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or ``None`` if there is none yet.

        A damaged one is reported by a warning, and the one before it used.

        Raises:
            ValueError: If there are checkpoints, but all are damaged.
        """
        numbers = self._numbers()
        for number in reversed(numbers):
            folder = self.checkpoints / _name(number)
            try:
                return _read(folder)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warnings.warn(
                    f"{folder} is damaged ({error}); going on from the checkpoint before it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if numbers:
            raise ValueError(f"all checkpoints in {self.checkpoints} are damaged; remove them to start again.")
        return None

    def _numbers(self) -> list[int]:
        names: Iterable[str] = (path.name for path in self.checkpoints.glob("step-*"))
        return sorted(int(name.removeprefix("step-")) for name in names)


def _name(number: int) -> str:
    return f"step-{number:09d}"


def _random_name(rank: int) -> str:
    return f"random-{rank}.safetensors"


def _read(folder: Path) -> Checkpoint:
    manifest: dict[str, str] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest.items():
        if checksum(folder / name) != expected:
            raise ValueError(f"{name} has another checksum than when it was written")
    ranks = [int(name.split("-")[1].split(".")[0]) for name in manifest if name.startswith("random-")]
    return Checkpoint(
        load_file(folder / _TENSORS),
        json.loads((folder / _VALUES).read_text(encoding="utf-8")),
        {rank: load_file(folder / _random_name(rank)) for rank in ranks},
    )


def _flushed_checksum(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return checksum(path)
