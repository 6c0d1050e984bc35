"""The loss terms of a training, collected without making any step wait."""

from typing import Any

import torch
from torch import Tensor

from hetkd.distributed import largest_of_processes
from hetkd.training.checkpoint import CHECKPOINTS, RunFolder


class TrainingDiverged(RuntimeError):
    """A loss term became NaN or Inf; the message names the term, the step and the last good checkpoint."""


class Terms:
    """Collects loss terms on the device, and reads them now and then so that no step waits for it.

    Args:
        folder: Of the run, for the message when it diverges.
        names: Of the terms of the steps of this epoch that are done already, if any.
        sums: Their sums over these steps.
        count: The number of these steps.
    """

    def __init__(self, folder: RunFolder | None, names: list[str], sums: Tensor | None, count: int) -> None:
        self.folder, self.names = folder, names
        self.newest: dict[str, float] = {}
        self.pending: list[tuple[int, int, Tensor]] = []
        self.sums, self.count = sums, count

    def add(self, epoch: int, step: int, terms: dict[str, Tensor]) -> None:
        """Takes the terms of one step; nothing waits for them yet."""
        self.names = list(terms)
        self.pending.append((epoch, step, torch.stack([term.detach().float() for term in terms.values()])))

    def read(self) -> dict[str, float]:
        """Returns the newest terms.

        Raises:
            TrainingDiverged: If a term was NaN or Inf since the last reading, in any process.
        """
        if self.pending:
            stacked = torch.stack([terms for _, _, terms in self.pending])
            values = stacked.cpu().double()
            self._check(values, stacked.device)
            for row in values:  # one by one, so that it does not matter when they are read
                self.sums = row.clone() if self.sums is None else self.sums + row
            self.count += len(values)
            self.newest = dict(zip(self.names, values[-1].tolist(), strict=True))
            self.pending = []
        return self.newest

    def _check(self, values: Tensor, device: torch.device) -> None:
        bad = (~values.isfinite()).nonzero()
        if not largest_of_processes(int(len(bad) > 0), device):
            return
        row, column = bad[0].tolist() if len(bad) else (0, 0)
        epoch, step, _ = self.pending[row]
        what = f"the loss term {self.names[column]!r} is {values[row, column].item()}"
        if not len(bad):
            what = "a loss term of another process is NaN or Inf"
        kept = "" if self.folder is None else f" The last good checkpoint is in {self.folder.path / CHECKPOINTS}."
        raise TrainingDiverged(
            f"{what} at epoch {epoch + 1}, step {step}: try a lower lr, clip_grad=1.0, or mixed_precision='no'.{kept}"
        )

    def means(self, accelerator: Any) -> dict[str, float]:
        """Returns the means of the terms over the epoch and all processes."""
        assert self.sums is not None, "read comes first"
        means = accelerator.reduce((self.sums / self.count).float().to(accelerator.device), "mean")
        return dict(zip(self.names, means.tolist(), strict=True))
