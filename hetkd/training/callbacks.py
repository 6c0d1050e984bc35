"""Callbacks of a training run, in the style of Lightning's and the Trainer's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetkd.distillation import Distillation


@dataclass
class Moment:
    """What a callback is told.

    Attributes:
        distiller: The distiller that is trained.
        epoch: The current epoch, from 1.
        step: Steps so far, in all epochs.
        record: After a step its loss terms, as tensors on the device; after an epoch its record, as in the history.
        is_stopping: Whether a callback asked for the end.
    """

    distiller: Distillation
    epoch: int
    step: int
    record: Mapping[str, Any] = field(default_factory=dict)
    is_stopping: bool = False

    def stop(self) -> None:
        """End the run after this step or epoch; what was trained is evaluated and saved as at the end of an epoch."""
        self.is_stopping = True


class Callback:
    """Base of callbacks for ``fit(callbacks=[...])``; each method may be left out.

    In several processes every process calls its own.

    Example:
        >>> class StopAt(Callback):
        ...     def on_epoch(self, moment):
        ...         if moment.record.get("top1", 0) > 90:
        ...             moment.stop()
    """

    def on_start(self, moment: Moment) -> None:
        """Run before the first step, also of a run that goes on."""

    def on_step(self, moment: Moment) -> None:
        """Run after each step."""

    def on_epoch(self, moment: Moment) -> None:
        """Run after each epoch, when it is evaluated and saved."""

    def on_end(self, moment: Moment) -> None:
        """Run after the last epoch."""


class _AfterEpoch(Callback):
    def __init__(self, function: Callable[[Moment], Any]) -> None:
        self.function = function

    def on_epoch(self, moment: Moment) -> None:
        self.function(moment)


def as_callbacks(callbacks: Sequence[Any]) -> list[Callback]:
    """Return callbacks; a function is called after each epoch.

    Raises:
        TypeError: If one is neither a `Callback` nor a function.
    """
    if callable(callbacks) or isinstance(callbacks, Callback):
        raise TypeError(f"callbacks={callbacks!r} must be a list: callbacks=[...].")
    for each in callbacks:
        if isinstance(each, type) or not (isinstance(each, Callback) or callable(each)):
            raise TypeError(f"callbacks has {each!r}: give hetkd.training.Callback objects or functions of a Moment.")
    return [each if isinstance(each, Callback) else _AfterEpoch(each) for each in callbacks]
