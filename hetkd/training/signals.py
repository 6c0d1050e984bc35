"""Signals that ask a run to save itself: clusters send one before they kill."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SAVE_AND_STOP = ("SIGINT", "SIGTERM")
SAVE_AND_GO_ON = ("SIGUSR1",)


class Signals:
    """Remembers a signal until the step is done and the checkpoint written.

    SIGINT (Ctrl-C) and SIGTERM stop the run after a checkpoint, SIGUSR1 only asks for one. A second
    SIGINT stops at once.

    Args:
        enabled: False leaves the signals as they are; so does a thread other than the main one.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.received: str | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        names = (*SAVE_AND_STOP, *SAVE_AND_GO_ON) if self._enabled else ()
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
        if name == self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = name

    def obey(self) -> None:
        """Stops the run if a signal asked for it, now that the checkpoint is written.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with the exit status that the shell gives it.
        """
        received, self.received = self.received, None
        if received == "SIGINT":
            raise KeyboardInterrupt
        if received == "SIGTERM":
            raise SystemExit(128 + signal.SIGTERM)
