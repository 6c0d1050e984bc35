"""The loss terms of a run, collected on the device so that no step waits for them."""

from typing import Any

import torch
from torch import Tensor, nn

from hetkd.training.checkpoint import CHECKPOINTS, RunFolder
from hetkd.training.run import EpochPart
from hetkd.training.sharding import local_part
from hetkd.utils.distributed import largest_of_processes


class TrainingDiverged(RuntimeError):
    """A loss term became NaN or Inf; the message names the term, the step and the last good checkpoint."""


class Terms:
    """The loss terms of an epoch: collected on the device, and read now and then.

    Args:
        part: Keeps their names, sums and count.
        folder: The run's, for the message when it diverges.
    """

    def __init__(self, part: EpochPart, folder: RunFolder | None) -> None:
        self.part, self.folder = part, folder
        self.newest: dict[str, float] = {}
        self.pending: list[tuple[int, int, Tensor]] = []
        self._teacher_is_finite: Tensor | None = None

    def add(self, epoch: int, step: int, terms: dict[str, Tensor], teacher_logits: Tensor | None = None) -> None:
        """Take the terms of one step, and look at the teacher's logits of the first one; nothing waits for it yet."""
        if teacher_logits is not None and self._teacher_is_finite is None:
            self._teacher_is_finite = teacher_logits.detach().isfinite().all()
        self.part.names = list(terms)
        self.pending.append((epoch, step, torch.stack([term.detach().float() for term in terms.values()])))

    def read(self) -> dict[str, float]:
        """Return the newest terms.

        Raises:
            TrainingDiverged: If a term was NaN or Inf since the last reading, in any process.
        """
        if self.pending:
            stacked = torch.stack([terms for _, _, terms in self.pending])
            values = stacked.cpu().double()
            self._check(values, stacked.device)
            for row in values:  # one by one, so that it does not matter when they are read
                self.part.sums = row.clone() if self.part.sums is None else self.part.sums + row
            self.part.count += len(values)
            self.newest = dict(zip(self.part.names, values[-1].tolist(), strict=True))
            self.pending = []
        return self.newest

    def _check(self, values: Tensor, device: torch.device) -> None:
        bad = (~values.isfinite()).nonzero()
        if not largest_of_processes(int(len(bad) > 0), device):
            return
        row, column = bad[0].tolist() if len(bad) else (0, 0)
        epoch, step, _ = self.pending[row]
        what = f"the loss term {self.part.names[column]!r} is {values[row, column].item()}"
        if not len(bad):
            what = "a loss term of another process is NaN or Inf"
        kept = "" if self.folder is None else f" The last good checkpoint is in {self.folder.path / CHECKPOINTS}."
        cure = "try a lower lr, clip_grad=1.0, or mixed_precision='no'"
        if self._teacher_is_finite is not None and not self._teacher_is_finite:
            cure = "the teacher's own logits are NaN or Inf: look at its weights, and at what masks its logits"
        raise TrainingDiverged(f"{what} at epoch {epoch + 1}, step {step}: {cure}.{kept}")

    def means(self, accelerator: Any) -> dict[str, float]:
        """Return the means of the terms over the epoch and all processes."""
        part = self.part
        assert part.sums is not None, "read comes first"
        means = accelerator.reduce((part.sums / part.count).float().to(accelerator.device), "mean")
        return dict(zip(part.names, means.tolist(), strict=True))


def refuse_broken_weights(distillation: nn.Module, epoch: int, device: torch.device) -> None:
    """Keep weights that are NaN or Inf out of checkpoints and evaluations; all processes take part.

    Raises:
        TrainingDiverged: If there is one in any process.
    """
    named = distillation.named_parameters()
    broken = next((repr(name) for name, parameter in named if not local_part(parameter).isfinite().all()), None)
    if largest_of_processes(int(broken is not None), device):
        raise TrainingDiverged(
            f"the weight {broken or 'of another process'} became NaN or Inf in epoch {epoch + 1}: try a lower lr "
            "or clip_grad=1.0."
        )
