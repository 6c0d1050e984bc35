"""The task of a distiller: what the user said, or what the models yield."""

from hetkd.tasks.classification import Classification
from hetkd.tasks.segmentation import Segmentation
from hetkd.tasks.task import Task
from hetkd.utils.checks import choice

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Segmentation)}


def is_dense_task(task: str | Task | None) -> bool | None:
    """Say whether a task's logits are maps; ``None`` if the models are to tell.

    Raises:
        TypeError: If it is neither a name nor a task.
        ValueError: If the name is unknown.
    """
    if task is None:
        return None
    if isinstance(task, str):
        return TASKS[choice("task", task, TASKS)].is_dense
    if not isinstance(task, Task):
        raise TypeError(f"task must be one of {sorted(TASKS)} or an object such as Segmentation(), got {task!r}.")
    return task.is_dense


def make_task(task: str | Task | None, *, is_dense: bool) -> Task:
    """Return the task of a distiller.

    Args:
        task: What the user said, or ``None``: read off the models.
        is_dense: Whether the student's logits are maps.

    Raises:
        ValueError: If the student's logits are of another task.
    """
    if task is None:
        task = Segmentation.name if is_dense else Classification.name
    made = TASKS[task]() if isinstance(task, str) else task
    if made.is_dense != is_dense:
        shapes = {True: "[B, classes, h, w]", False: "[B, classes]"}
        raise ValueError(
            f"task={made.name!r} needs logits {shapes[made.is_dense]}, but the student yields {shapes[is_dense]}: "
            "load_model('timm:NAME', task='segmentation', num_classes=...) makes a segmenter of a timm encoder."
        )
    return made
