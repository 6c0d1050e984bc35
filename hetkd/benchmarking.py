"""Size and speed of any model."""

from pathlib import Path

from torch import nn

from hetkd.distillation import Distillation
from hetkd.models.load import load_model
from hetkd.speed import Speed, speed_of
from hetkd.student import Student, load_student
from hetkd.utils.checks import whole_number


def bench(model: str | Path | nn.Module | Student | Distillation, *, batch_size: int = 32) -> Speed:
    """Measure size and speed of a model as it is deployed: in eval mode, in its own dtype, on the device where it is.

    Args:
        model: A saved student by its path, any name of `hetkd.load_model`, a module, or a distiller (its student).
        batch_size: Images a batch, for the images per second.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model.

    Example:
        >>> speed = bench("timm:test_resnet", batch_size=4)
        >>> speed.parameters, speed.size
        (469688, (160, 160))
    """
    return speed_of(_distillation_of(model), whole_number("batch_size", batch_size))


def _distillation_of(model: str | Path | nn.Module | Student | Distillation) -> Distillation:
    if isinstance(model, Student):
        return model.distillation
    if isinstance(model, Distillation):
        return model
    if isinstance(model, nn.Module):
        return Distillation(None, model, "ce", ce_weight=0)
    if isinstance(model, Path) or Path(model).expanduser().exists():
        return load_student(model).distillation
    return Distillation(None, load_model(model, pretrained=False), "ce", ce_weight=0)
