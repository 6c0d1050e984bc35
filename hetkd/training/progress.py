"""Progress in the terminal: a bar with loss terms, images/s and time left, and a line an epoch."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A progress bar over all steps of a run.

    Args:
        epochs: Epochs of the run.
        steps: Steps of an epoch, or ``None`` if the loader does not say.
        first_epoch: The first epoch, from 0, after a resume.
        first_step: Finished steps of this epoch.
        enabled: ``False`` shows nothing.
    """

    def __init__(self, epochs: int, steps: int | None, first_epoch: int, first_step: int = 0, *, enabled: bool) -> None:
        self._epochs = epochs
        self._console = Console(quiet=not enabled, highlight=False, markup=False, emoji=False)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs), markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}", markup=False),
            TextColumn("{task.fields[speed]:.0f} images/s", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not enabled or not self._console.is_terminal,
        )
        total = None if steps is None else steps * epochs
        done = first_step if steps is None else steps * first_epoch + first_step
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


def _listed(terms: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in terms.items())
