"""Everything that can be wrong with data and teachers, said at once and before training."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hetkd.data.images import TensorImages, TransformedImages, make_loader
from hetkd.data.samples import Keys
from hetkd.data.survey import Survey, survey
from hetkd.distillation import Distillation
from hetkd.training.classes import name_classes
from hetkd.training.evaluate import eval_loader, look_at_images, refuse_nameless
from hetkd.training.look import remarks, take_classes, teachers_accuracy

_SHOWN = 30


@dataclass(repr=False)
class DataCheck:
    """What `hetkd.Distiller.check` found; ``print`` shows all of it.

    Attributes:
        surveys: Of the splits.
        teachers_top1: Top-1 of each teacher in percent, by role, on validation images or else on training images.
        notes: What a person should know.
        problems: What would stop a training, or make it a bad one.
        table: Rows of class name, training images, validation images, and the teacher's name for this output.
    """

    surveys: list[Survey] = field(default_factory=list)
    teachers_top1: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    table: list[tuple[str, str, str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<DataCheck: {len(self.problems)} problem{'s' * (len(self.problems) != 1)}>"

    def __str__(self) -> str:
        """Say all of it, the problems last."""
        header = ("class", "train", "val", "teacher's class")
        shown = self.table if len(self.table) <= _SHOWN else self.table[:_SHOWN]
        rows = [header, *shown] if self.table else []
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if len(shown) < len(self.table):
            lines.append(f"... and {len(self.table) - len(shown):,} more classes")
        bad = [f"PROBLEM: {problem}" for problem in self.problems]
        parts = [*(str(each) for each in self.surveys), *self.notes, *([""] if lines else []), *lines, ""]
        return "\n".join([*parts, *(bad or ["no problem found"])])


def check(distillation: Distillation, train: Any, val: Any, *, batch_size: int, keys: Keys) -> DataCheck:
    """Look at the data; see `hetkd.Distiller.check`."""
    found = DataCheck()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        _look(distillation, train, val, batch_size, keys, found)
    found.problems += [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    return found


def _look(distillation: Distillation, train: Any, val: Any, batch_size: int, keys: Keys, found: DataCheck) -> None:
    def tried(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (ValueError, TypeError, OSError) as error:
            found.problems.append(str(error))
            return None

    inputs, size = distillation.student_inputs, distillation.loading_size
    loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "keys": keys}
    loading |= {"make": distillation.task.make_dataset}
    loaders = {
        "train": tried(lambda: make_loader(train, what="train", spec=inputs.spec, size=size, train=True, **loading))
    }
    trained = getattr(loaders["train"], "dataset", None)
    tried(lambda: _survey(found, "train", trained))
    take_classes(distillation, found.surveys)
    found.notes += tried(lambda: name_classes(distillation, loaders["train"])) or []
    found.notes += tried(lambda: distillation.task.remarks(trained)) or []
    if val is not None:
        loaders["val"] = tried(lambda: eval_loader(distillation, val, batch_size, 0, keys, found.notes))
        tried(lambda: refuse_nameless(distillation, trained, loaders["val"]))
        tried(lambda: _survey(found, "val", getattr(loaders["val"], "dataset", None)))
    for what, loader in loaders.items():
        if not any(each.unreadable for each in found.surveys if each.what == what):  # which is a problem of its own
            tried(partial(look_at_images, distillation, loader, what))
    found.notes += tried(lambda: remarks(distillation, found.surveys)) or []
    what = "train" if loaders.get("val") is None else "val"
    said, found.teachers_top1 = tried(lambda: teachers_accuracy(distillation, loaders[what], what)) or ([], {})
    found.notes += said
    found.table = _class_table(distillation, found.surveys)


def _survey(found: DataCheck, what: str, dataset: Any) -> None:
    if not isinstance(dataset, (TransformedImages, TensorImages)):
        if dataset is not None or what == "train":
            found.notes.append(f"{what} is a loader, or cannot be opened: nothing is known before it is iterated")
        return
    looked_at = range(len(dataset)) if isinstance(dataset, TransformedImages) else ()
    each = survey(dataset, what, looked_at=looked_at)
    found.surveys.append(each)
    if each.unreadable:
        some = ", ".join(each.unreadable[:5]) + (", ..." if len(each.unreadable) > 5 else "")
        found.problems.append(
            f"{len(each.unreadable)} images of {what} cannot be read ({some}): repair or remove them, or use "
            "unreadable='skip'."
        )


def _class_table(distillation: Distillation, surveys: list[Survey]) -> list[tuple[str, str, str, str]]:
    counts = {each.what: each.counts.tolist() for each in surveys if each.counts is not None}
    count = max((len(each) for each in counts.values()), default=0)
    names = distillation.class_names or [str(number) for number in range(count)]
    taps = distillation.teachers.taps if distillation.method.uses_teacher_logits else []
    labels = taps[0].labels if taps else None

    def images(what: str, number: int) -> str:
        return f"{counts[what][number]:,}" if what in counts and number < len(counts[what]) else "-"

    def teachers_name(number: int) -> str:
        if labels is None or number >= len(labels.names):
            return "-"
        return labels.names[number][-1] + ("" if labels.certain else " (if its weights are ImageNet's)")

    rows = [(name, images("train", n), images("val", n), teachers_name(n)) for n, name in enumerate(names)]
    return [row for row in rows if row[1:3] not in (("0", "0"), ("0", "-"), ("-", "-"))]
