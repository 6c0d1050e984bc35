"""All that differs between classification and semantic segmentation: labels, losses, data, metrics."""

from hetkd.tasks.choice import is_dense_task, make_task
from hetkd.tasks.classification import Classification
from hetkd.tasks.segmentation import Segmentation
from hetkd.tasks.task import Metrics, Task

__all__ = ["Classification", "Metrics", "Segmentation", "Task", "is_dense_task", "make_task"]
