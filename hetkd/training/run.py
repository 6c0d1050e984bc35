"""A training run: its parts, which are made once, and its state, which is saved and restored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.distillation import Distillation
from hetkd.training.batches import Batches, TargetMaker
from hetkd.training.checkpoint import RunFolder
from hetkd.training.options import TrainingOptions
from hetkd.utils.notebook import table

_NEXT_ORDER = 1_000_003
"""Added to the seed and the number of the epoch after each return: another order of the data, the same in each run."""


def score(record: Mapping[str, float]) -> float:
    """Return what epochs are compared by, of an epoch's record; -1 if it was not evaluated."""
    return next((record[name] for name in ("top1", "miou", "knn", "agreement") if name in record), -1.0)


@dataclass
class FitResult:
    """The result of a training run.

    Attributes:
        history: One record an epoch: ``epoch`` (from 1), ``lr``, ``train/TERM`` (mean of each loss term),
            ``images_per_second``, ``seconds``, and with validation data ``top1``, ``top5``, ``loss``, or, where labels
            do not teach, ``agreement`` and ``knn``.
        best: The record with the highest ``top1``, else ``knn``, else ``agreement`` (without validation data: the last
            one).
        output_dir: The folder with the files of the run, or ``None``.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    output_dir: Path | None = None

    def _repr_html_(self) -> str:
        """Return the history as a table for notebooks, with a word on the best epoch below."""
        names = list(dict.fromkeys(name for record in self.history for name in record))
        rows = [[f"{record[name]:.6g}" if name in record else "" for name in names] for record in self.history]
        best = f"best epoch: {self.best['epoch']:.0f}" if "epoch" in self.best else ""
        files = f"{self.output_dir}/best.safetensors" if self.output_dir is not None else ""
        return table(names, rows, below="\n".join(line for line in (best, files) if line))


@dataclass
class EpochPart:
    """The finished part of an epoch; by default nothing.

    Attributes:
        step: Number of steps.
        images: Number of images of this process.
        seconds: Time of these steps.
        names: Names of the loss terms.
        sums: ``[terms]``, float64: the sums of the loss terms over ``count`` steps.
        count: Number of steps in ``sums``.
        random: Random states to restore before the next step, after an interruption.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    sums: Tensor | None = None
    count: int = 0
    random: dict[str, Tensor] | None = None


@dataclass
class RunState:
    """Progress of a run; a checkpoint holds it beside weights and optimizer.

    Attributes:
        epoch: Number of whole epochs.
        part: The finished part of the next one.
        update: Number of updates of the weights.
        steps: Number of steps in all epochs; it names the checkpoints.
        returned: How many times the run went back to a checkpoint after it diverged.
        history: See `FitResult`.
        best: See `FitResult`.
        best_checkpoint: The number of the checkpoint of the best epoch.
        is_stopping: Whether a callback asked for the end; a run that goes on begins anew.
    """

    epoch: int = 0
    part: EpochPart = field(default_factory=EpochPart)
    update: int = 0
    steps: int = 0
    returned: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_checkpoint: int | None = None
    is_stopping: bool = False

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations there were after the best one."""
        best = self.best.get("epoch", 0.0)
        return sum(score(record) >= 0 and record["epoch"] > best for record in self.history)

    @property
    def order(self) -> int:
        """The number that the order of the data and the augmentation of this epoch depend on."""
        return self.epoch + self.returned * _NEXT_ORDER

    def seed(self, seed: int, processes: int) -> int:
        """Return the seed of this epoch, for a run of ``processes`` processes with this seed."""
        return seed + self.epoch * processes + self.returned * _NEXT_ORDER


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        whole: The user's distillation.
        distillation: The one that is trained: the same, or its copy under FSDP.
        model: Its wrapper (DDP, FSDP, DeepSpeed), or itself.
        optimizer: As Accelerate wraps it.
        scheduler: timm's, or ``None`` where the number of updates is unknown.
        ema: timm's average of the student's weights, or ``None``.
        train: Training data, batch by batch.
        val: A loader, or ``None``.
        mixing: Augments and mixes batches.
        accelerator: Accelerate's.
        folder: The output folder, or ``None``.
        options: Of `fit`.
        epochs: How many to train in all.
        keeps_checkpoints: Whether the run can be resumed.
        fingerprints: What tells training data and teachers from others.
        notes: What to tell the user at the start.
        teachers_top1: Top-1 in percent of the teachers that were measured, by role.
        kept_in_eval: Modules of the student that the user put into eval mode.
        state: How far the run is.
    """

    whole: Distillation
    distillation: Distillation
    model: Any
    optimizer: Any
    scheduler: Any
    ema: Any
    train: Batches
    val: Any
    mixing: TargetMaker
    accelerator: Any
    folder: RunFolder | None
    options: TrainingOptions
    epochs: int
    keeps_checkpoints: bool
    fingerprints: dict[str, Any]
    notes: list[str]
    teachers_top1: dict[str, float]
    kept_in_eval: list[nn.Module]
    state: RunState = field(default_factory=RunState)

    @property
    def is_out_of_steps(self) -> bool:
        """Whether ``max_steps`` are done, or a callback asked for the end."""
        last = self.options.max_steps
        return self.state.is_stopping or (last is not None and self.state.steps >= last)

    @property
    def is_last_epoch(self) -> bool:
        """Whether the epoch that was trained now is the last, as far as it is known before its evaluation."""
        return self.is_out_of_steps or self.state.epoch + 1 >= self.epochs

    @property
    def is_over(self) -> bool:
        """Whether all epochs or steps are done, no epoch was better for long, or a callback asked for the end."""
        if self.state.epoch >= self.epochs or self.is_out_of_steps:
            return True
        patience = self.options.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device
