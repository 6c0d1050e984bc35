"""The plan: what is matched with what, as a table."""

from dataclasses import dataclass

from hetkd.utils.notebook import table

_HEADER = ("stage", "teacher", "shape", "student", "shape", "match", "added parameters")


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan: a stage pair, or the logits.

    Attributes:
        stage: Row of the automatic pairing, as ``stages=`` takes it; ``"own"`` for a pair that is not in it; or
            ``"logits"``.
        teacher: Path of the teacher's module.
        teacher_shape: ``(C, h, w)``, or ``(classes,)``.
        student: Path of the student's module.
        student_shape: ``(C, h, w)``, or ``(classes,)``.
        match: Where and how both meet: the common grid, or what the method compares.
        added_parameters: Learnt beside the student, and dropped after training.
    """

    stage: str
    teacher: str
    teacher_shape: tuple[int, ...]
    student: str
    student_shape: tuple[int, ...]
    match: str
    added_parameters: int


@dataclass(frozen=True)
class Plan:
    """The stage pairs and losses of a distiller; ``print(plan)`` shows a table.

    Attributes:
        title: Teacher, student, method.
        rows: One a stage pair that the method uses, and one for the logits if it uses these.
        added_parameters: Their sum.
        remark: A sentence below the table, or an empty string.
        inputs: A line for each model: size, mean and standard deviation of its images, and where they come from.
    """

    title: str
    rows: tuple[PlanRow, ...]
    added_parameters: int
    remark: str = ""
    inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [_HEADER, *self._cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = "  ".join("-" * width for width in widths)
        shown = [texts[0].rstrip(), rule, *(line.rstrip() for line in texts[1:])]
        return "\n".join([self.title, *self.inputs, "", *shown, "", self._sum])

    def _repr_html_(self) -> str:
        """Return the same for notebooks."""
        return table(_HEADER, self._cells, "\n".join([self.title, *self.inputs]), self._sum)

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.stage,
                row.teacher,
                _shape(row.teacher_shape),
                row.student,
                _shape(row.student_shape),
                row.match,
                f"{row.added_parameters:,}",
            )
            for row in self.rows
        ]

    @property
    def _sum(self) -> str:
        total = f"{self.added_parameters:,} parameters are added for the training and dropped after it."
        return f"{total}\n{self.remark}" if self.remark else total


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
