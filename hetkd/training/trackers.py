"""Accelerate's trackers, which never end a run."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self


class Trackers:
    """The trackers of a run. Errors at the start raise; later on a tracker that fails is left out, with a note.

    Args:
        accelerator: The run's.
        settings: The run's; simple values go to the trackers.
        note: Tells the user.
    """

    def __init__(self, accelerator: Any, settings: Mapping[str, Any], note: Callable[[str], None]) -> None:
        self.accelerator, self.note = accelerator, note
        self.active: list[Any] = []
        self._settings = {name: x for name, x in settings.items() if isinstance(x, (bool, int, float, str))}

    def __enter__(self) -> Self:
        if self.accelerator.log_with:
            self.accelerator.init_trackers("hetkd", config=self._settings)
            self.active = list(self.accelerator.trackers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each(lambda tracker: tracker.finish())

    def log(self, record: Mapping[str, float]) -> None:
        """Log the record of an epoch, under its number."""
        self._each(lambda tracker: tracker.log(record, step=int(record["epoch"])))

    def _each(self, action: Callable[[Any], Any]) -> None:
        for tracker in list(self.active):
            try:
                action(tracker)
            except Exception as error:  # of anyone's server or disk; the run is worth more
                self.active.remove(tracker)
                self.note(f"tracker {getattr(tracker, 'name', tracker)} fails and is left out: {error!r}")
