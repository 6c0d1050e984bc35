"""Signals that ask a run to save itself: clusters send one before they kill."""

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from hetkd.data.seeding import generators_kept
from hetkd.utils.distributed import largest_of_processes

SIGNALS = ("SIGUSR1", "SIGTERM", "SIGINT")
"""The signals that are heeded; if processes get different ones, the last in this list counts."""
_ONE_KEYSTROKE = 1.0
"""Seconds within which a second SIGINT is the first one, passed on by a launcher."""


class QuietWorker:
    """Starts a loading process that leaves signals to the run, which still needs its batches for a checkpoint.

    Clusters send signals to all processes of a job at once. A loading process heeds only the run's own SIGTERM.

    Args:
        then: The loader's own ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then, self.run = then, os.getpid()  # the parent may be a fork server

    def __call__(self, worker: int) -> None:
        """Start loading process ``worker``."""
        if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
            threading.Thread(target=_heed, args=(self.run,), daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _heed(run: int) -> None:
    while signal.sigwaitinfo(_numbers()).si_pid != run:
        pass
    os._exit(0)


def with_quiet_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy of a loader whose processes leave signals to the run; iterate it by `quietly`."""
    quiet = copy.copy(loader)
    if hasattr(quiet, "base_dataloader"):  # the user had it prepared by Accelerate
        quiet.base_dataloader = with_quiet_workers(quiet.base_dataloader)
    quiet.worker_init_fn = QuietWorker(loader.worker_init_fn)
    return quiet


def quietly(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate a loader; signals wait while its quiet processes start, which would die of them.

    Processes that outlive an epoch are seeded in the first one only: that draw is taken back, so that a run which goes
    on later, with new processes, sees the same random numbers.
    """
    iterator, end = iter(loader), object()
    has_quiet_workers = isinstance(getattr(loader, "worker_init_fn", None), QuietWorker)
    persist = getattr(loader, "persistent_workers", False)
    with _waiting_signals() if has_quiet_workers else nullcontext(), generators_kept() if persist else nullcontext():
        first = next(iterator, end)
    if first is not end:
        yield first
        yield from iterator


@contextmanager
def _waiting_signals() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _numbers() -> set[int]:
    return {int(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}


class Signals:
    """Remembers a signal until the step is done and the checkpoint written.

    SIGINT (Ctrl-C) and SIGTERM stop the run after a checkpoint, SIGUSR1 only asks for one. A second SIGINT stops at
    once. A signal that one of several processes gets counts for all.

    Args:
        enabled: ``False`` leaves the signals as they are; so does a thread other than the main one.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.received: str | None = None  # by this process
        self.agreed: str | None = None  # by all
        self._received_at = 0.0
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        names = SIGNALS if self._enabled else ()
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.received == "SIGINT" and time.monotonic() - self._received_at > _ONE_KEYSTROKE:
            raise KeyboardInterrupt
        self.received, self._received_at = name, time.monotonic()

    def agree(self, device: torch.device) -> None:
        """Share the signal of one process with all; all call it at the same point.

        Args:
            device: Where the processes exchange tensors.
        """
        number = 0 if self.received is None else 1 + SIGNALS.index(self.received)
        number = largest_of_processes(number, device)
        self.agreed = SIGNALS[number - 1] if number else None

    def obey(self) -> None:
        """Stop the run if a signal that was agreed on asked for it, now that the checkpoint is written.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with the exit status that the shell gives it.
        """
        agreed, self.agreed = self.agreed, None
        if self.received == agreed:  # else another one came meanwhile
            self.received = None
        if agreed == "SIGINT":
            raise KeyboardInterrupt
        if agreed == "SIGTERM":
            raise SystemExit(128 + signal.SIGTERM)


def end_without_traceback(error: BaseException) -> None:
    """Have the interpreter end without a traceback, and with the usual exit status, if this error ends it."""
    error._hetkd_has_said_all = True  # type: ignore[attr-defined]
    if sys.excepthook is not _quiet_hook:
        _hooks.append(sys.excepthook)
        sys.excepthook = _quiet_hook


_hooks: list[Any] = []


def _quiet_hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    if not getattr(value, "_hetkd_has_said_all", False):
        _hooks[-1](kind, value, trace)
