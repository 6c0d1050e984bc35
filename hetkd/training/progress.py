"""Progress in the terminal: a bar with loss terms, images/s and time left, and a line an epoch.

Where there is no terminal (a log file, a job of a cluster, a notebook without ipywidgets), a line a minute stands for
the bar.
"""

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_A_LINE = 60.0
_WORTH_SAYING = 60.0


class TrainingProgress:
    """A progress bar over all steps of a run, or lines where there is no terminal.

    Args:
        epochs: Epochs of the run.
        steps: Steps of an epoch, or ``None`` if the loader does not say.
        first_epoch: The first epoch, from 0, after a resume.
        first_step: Finished steps of this epoch.
        enabled: ``False`` shows nothing.
    """

    def __init__(self, epochs: int, steps: int | None, first_epoch: int, first_step: int = 0, *, enabled: bool) -> None:
        self._epochs, self._steps = epochs, steps
        self._began = self._said = time.monotonic()
        self._first_shown: tuple[float, float] | None = None
        self._is_estimated = False
        self._console = Console(quiet=not enabled, highlight=False, markup=False, emoji=False)
        # A notebook draws the bar by widgets, or not at all.
        has_widgets = self._console.is_jupyter and find_spec("ipywidgets") is not None
        self._shows_bar = self._console.is_terminal or has_widgets
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs), markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}", markup=False),
            TextColumn("{task.fields[speed]:.0f} images/s", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not enabled or not self._shows_bar,
        )
        total = None if steps is None else steps * epochs
        done = self._done_before = first_step if steps is None else steps * first_epoch + first_step
        self._task: TaskID = self._bar.add_task(
            "", total=total, completed=done, epoch=first_epoch + 1, terms="", speed=0.0
        )

    def __enter__(self) -> Self:
        self._safely(self._bar.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._safely(self._bar.stop)

    def step(self) -> None:
        """Count one step."""
        self._bar.advance(self._task)

    def show(self, epoch: int, terms: Mapping[str, float], speed: float) -> None:
        """Show the newest loss terms and speed."""
        self._bar.update(self._task, epoch=epoch + 1, terms=_listed(terms), speed=speed)
        self._estimate()
        if not self._shows_bar and time.monotonic() - self._said >= _SECONDS_A_LINE:
            self._said = time.monotonic()
            self.note(self._line(epoch, terms, speed))

    def _estimate(self) -> None:
        """Say once, when the first steps are over, how long an epoch and the run will take."""
        task, now = self._bar.tasks[self._task], time.monotonic()
        if self._is_estimated or self._steps is None:
            return
        if self._first_shown is None:  # the first steps are slower than those to come
            self._first_shown = now, task.completed
            return
        since, done = self._first_shown
        self._is_estimated = True
        epoch = self._steps * (now - since) / (task.completed - done)
        if epoch * self._epochs >= _WORTH_SAYING:
            whole = f", {_duration(epoch * self._epochs)} for {self._epochs}" if self._epochs > 1 else ""
            self.note(f"an epoch will take about {_duration(epoch)}{whole}, without validation")

    def _line(self, epoch: int, terms: Mapping[str, float], speed: float) -> str:
        task = self._bar.tasks[self._task]
        of_epoch = f"{task.completed:.0f}"
        left = ""
        if self._steps is not None and task.total is not None:
            of_epoch = f"{task.completed - epoch * self._steps:.0f}/{self._steps}"
            rate = (task.completed - self._done_before) / (self._said - self._began)
            left = f"  {_duration((task.total - task.completed) / rate)} left" if rate > 0 else ""
        return f"epoch {epoch + 1:>3}/{self._epochs}  step {of_epoch}  {_listed(terms)}  {speed:.0f} images/s{left}"

    def epoch_done(self, record: Mapping[str, float]) -> None:
        """Print the line of an epoch."""
        terms = {name.removeprefix("train/"): value for name, value in record.items() if name.startswith("train/")}
        parts = [
            f"epoch {int(record['epoch']):>3}/{self._epochs}",
            _listed(terms),
            f"{record['images_per_second']:.0f} images/s",
        ]
        if "top1" in record:
            parts.append(f"val top-1 {record['top1']:.2f} top-5 {record['top5']:.2f} loss {record['loss']:.3f}")
        if "miou" in record:
            overlap = f"mIoU {record['miou']:.2f} pixels {record['pixel_accuracy']:.2f}"
            parts.append(f"val {overlap} loss {record['loss']:.3f}")
        names = {"agreement": "agreement with the teacher", "knn": "nearest neighbours' top-1"}
        parts += [f"{words} {record[name]:.2f}" for name, words in names.items() if name in record]
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        """Print a line."""
        self._safely(lambda: self._console.print(text, soft_wrap=True))

    def _safely(self, action: Callable[[], object]) -> None:
        """Do what writes to the terminal, or stay silent from now on: a full or closed output never ends a run."""
        try:
            action()
        except UnicodeEncodeError as error:  # of a console that lacks a character: print what it has
            self._console.print(error.object.encode("ascii", "backslashreplace").decode(), soft_wrap=True)
        except (OSError, ValueError):
            self._console.quiet = True


def _duration(seconds: float) -> str:
    """Say a time in the two largest units.

    >>> _duration(45), _duration(125), _duration(7260)
    ('45 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _listed(terms: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in terms.items())
