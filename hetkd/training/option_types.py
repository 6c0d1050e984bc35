"""The options of `hetkd.Distiller.fit` with their types, so that editors complete them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor


class FitOptions(TypedDict, total=False):
    """The fields of `hetkd.training.TrainingOptions`, which says what each does; a test holds both together."""

    batch_size: int
    optimizer: str | Callable[..., Any]
    optimizer_options: Mapping[str, Any] | None
    lr: float | None
    weight_decay: float
    layer_decay: float | None
    method_lr: float | None
    momentum: float
    scheduler: str
    decay_epochs: float
    decay_rate: float
    warmup_epochs: float
    warmup_lr: float | None
    min_lr: float
    mixed_precision: str | None
    half_weights: bool
    gradient_accumulation: int
    clip_grad: float | None
    ema: float | None
    mixup: float
    cutmix: float
    class_weights: str | Sequence[float] | None
    balanced_sampling: bool
    label_smoothing: float
    augment: str | Callable[[Tensor], Tensor] | None
    min_crop: float | None
    num_workers: int
    image_key: str | None
    label_key: str | None
    unreadable: str
    seed: int
    cpu: bool
    max_steps: int | None
    eval_every: int
    patience: int | None
    callbacks: Sequence[Any]
    sync_batchnorm: bool
    report: bool
    checkpoint_steps: int | None
    checkpoint_minutes: float | None
    keep_last: int
    keep_best: bool
    progress: bool
    log_every: int
    trackers: Sequence[Any]
    teacher_cache: str | Path | None
    returns: int
    teacher_placement: str
    compile: bool
