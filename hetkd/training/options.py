"""The options of a training run, checked before it starts."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hetkd.data.augment import PRESETS
from hetkd.data.samples import Keys
from hetkd.training.callbacks import as_callbacks
from hetkd.utils.checks import check_option_names, choice, not_negative, positive, unknown_name, whole_number

_LARGEST_SEED = 4_000_000_000  # NumPy takes 32 bits, and each epoch and process adds to it
LEARNING_RATES = {"sgd": 0.05, "adamw": 1e-3, "lamb": 5e-3}


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `hetkd.Distiller.fit`.

    Attributes:
        batch_size: Images per step and process; a loader has its own batch size.
        optimizer: A name of timm's optimizers (``"adamw"``, ``"sgd"``, ``"lamb"``, ...), or a class or function of
            parameter groups: ``torch.optim.RAdam``.
        optimizer_options: Further options of the optimizer: ``{"betas": (0.9, 0.95)}``.
        lr: Peak learning rate; ``None``: 1e-3 for adamw, 0.05 for sgd, 5e-3 for lamb.
        weight_decay: Decay of weights; biases and norms have none.
        layer_decay: Factor of the learning rate from each layer of the student to the one before it, for fine-tuning
            (0.75 is usual for a ViT); ``None``: all layers learn at the same rate.
        method_lr: Peak learning rate of the method's own parameters (projections); ``None``: ``lr``.
        momentum: SGD momentum.
        scheduler: One of timm's: ``"cosine"``, ``"tanh"``, ``"poly"`` (a straight line), ``"step"`` or ``"constant"``.
        decay_epochs: Epochs between two steps of the schedule ``"step"``.
        decay_rate: Factor of a step of the schedule ``"step"``.
        warmup_epochs: Epochs of linear warm-up; they are part of ``epochs``.
        warmup_lr: Learning rate at the start of the warm-up; ``None``: ``lr / 100``.
        min_lr: Learning rate at the end of the schedule.
        mixed_precision: ``"no"``, ``"bf16"``, ``"fp16"``, or ``None``: the choice of ``accelerate launch``.
        half_weights: Train a student with weights in half precision as it is; otherwise they become float32, since
            small updates would be rounded away. ``mixed_precision`` computes in half precision all the same.
        gradient_accumulation: Batches per update of the weights.
        clip_grad: Largest norm of the gradient; a larger one is scaled down. ``None``: no clipping.
        ema: Decay of the average of the student's weights, e.g. 0.9999; ``None``: no average.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        class_weights: Weights of the classes in the cross-entropy: a number each, in the order of the data's classes,
            or ``"balanced"``: the inverse of their shares of the training images.
        balanced_sampling: Draw training images so that each class comes equally often
            (``torch.utils.data.WeightedRandomSampler``), for unbalanced folders.
        label_smoothing: Smoothing of hard labels; the teacher's term does not change.
        augment: Augmentation of batches on the training device: ``"light"`` (shift and flip) or ``"strong"`` (also
            RandAugment and erasing), presets of kornia (`hetkd.data.augment.Augmentation`), or any function of images
            ``[B, C, H, W]`` in [0, 1], for example a ``kornia.augmentation.AugmentationSequential``.
        min_crop: Smallest share of a training picture's area that its random crop keeps; 1 crops as little as the shape
            allows. ``None``: 0.08, and 0.25 for segmentation. For files and PIL images; tensors and loaders are taken
            as they are.
        num_workers: Processes that load images; a loader has its own.
        image_key: Name of the images in samples that are dicts; ``None``: found by name or type.
        label_key: The same for the labels.
        unreadable: What to do with an unreadable image: ``"error"`` ends the run with its path, ``"skip"`` takes the
            next image of ``train`` instead, and counts and names the bad ones at the end of the epoch; those of ``val``
            are left out, after one pass over it.
        seed: Seed of data order, augmentation and dropout.
        cpu: Train on the CPU although there is an accelerator.
        max_steps: End after so many steps (batches) in all, even if ``epochs`` would last longer; the schedule ends
            there too. ``epochs`` is not needed then.
        eval_every: Epochs between two evaluations; the last epoch is always evaluated.
        patience: End after so many evaluations without a better top-1 (early stopping), or without labels a better
            ``knn`` or ``agreement``; ``None``: never.
        callbacks: `hetkd.training.Callback` objects, or functions that are called after each epoch.
        sync_batchnorm: Compute the statistics of batch norms over all processes; on GPUs only.
        report: Write ``OUTPUT_DIR/report.html`` at the end, see `hetkd.Distiller.report`; needs ``val`` with labels.
        checkpoint_steps: Steps between checkpoints within an epoch; ``None``: by minutes alone. A checkpoint is always
            written at the end of an epoch, and when SIGTERM, SIGINT or SIGUSR1 arrives.
        checkpoint_minutes: Minutes between checkpoints within an epoch; ``None``: no such checkpoints.
        keep_last: Number of checkpoints to keep; if the last is damaged, the one before it serves.
        keep_best: Keep the checkpoint of the best epoch too; ``best.safetensors``, its student, is always kept.
        progress: Show a progress bar, and print a line after each epoch.
        log_every: Steps between two readings of the loss, each of which looks for NaN and Inf.
        trackers: Names of Accelerate's trackers (``"tensorboard"``, ``"wandb"``, ``"mlflow"``, ...) or tracker objects:
            they get the settings, and the record of each epoch. Files go to ``output_dir``.
        teacher_cache: A folder that `hetkd.Distiller.cache_teacher` made; the teacher is not run.
        returns: How many times to restart from the last checkpoint, with a new data order, after a NaN or Inf in a loss
            or weight; 0 raises at once.
        teacher_placement: ``"device"``; ``"sharded"`` over all processes, or ``"offloaded"`` to main memory, for
            teachers that do not fit: blocks move to the device only while they run; the placement lasts after ``fit``.
        compile: Compile models and method block by block before the first step (`hetkd.Distiller.compile`).
    """

    batch_size: int = 64
    optimizer: str | Callable[..., Any] = "adamw"
    optimizer_options: Mapping[str, Any] | None = None
    lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    method_lr: float | None = None
    momentum: float = 0.9
    scheduler: str = "cosine"
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    warmup_epochs: float = 0.0
    warmup_lr: float | None = None
    min_lr: float = 1e-6
    mixed_precision: str | None = None
    half_weights: bool = False
    gradient_accumulation: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: str | Sequence[float] | None = None
    balanced_sampling: bool = False
    label_smoothing: float = 0.0
    augment: str | Callable[[Tensor], Tensor] | None = None
    min_crop: float | None = None
    num_workers: int = 0
    image_key: str | None = None
    label_key: str | None = None
    unreadable: str = "error"
    seed: int = 0
    cpu: bool = False
    max_steps: int | None = None
    eval_every: int = 1
    patience: int | None = None
    callbacks: Sequence[Any] = ()
    sync_batchnorm: bool = False
    report: bool = False
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep_last: int = 2
    keep_best: bool = False
    progress: bool = True
    log_every: int = 10
    trackers: Sequence[Any] = ()
    teacher_cache: str | Path | None = None
    returns: int = 0
    teacher_placement: str = "device"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "log_every", "keep_last", "eval_every"):
            whole_number(name, getattr(self, name))
        for name in ("checkpoint_steps", "max_steps", "patience"):
            whole_number(name, 1 if getattr(self, name) is None else getattr(self, name))
        for name in ("weight_decay", "momentum", "warmup_epochs", "min_lr", "mixup", "cutmix", "num_workers"):
            not_negative(name, getattr(self, name))
        for name in ("lr", "warmup_lr", "clip_grad", "checkpoint_minutes", "method_lr"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("layer_decay", "min_crop"):
            value = getattr(self, name)
            if value is not None and not 0 < positive(name, value) <= 1:
                raise ValueError(f"{name}={value} must be more than 0 and at most 1.")
        if not isinstance(self.class_weights, str | None):  # also an array
            object.__setattr__(self, "class_weights", _checked_weights([float(x) for x in self.class_weights]))
        if isinstance(self.class_weights, str):
            choice("class_weights", self.class_weights, ["balanced"])
        if not (hasattr(self.seed, "__index__") and 0 <= self.seed <= _LARGEST_SEED):
            raise ValueError(f"seed={self.seed!r} must be a whole number from 0 to {_LARGEST_SEED:,}.")
        as_callbacks(self.callbacks)
        if not (isinstance(self.returns, int) and self.returns >= 0):
            raise ValueError(f"returns={self.returns!r} must be a whole number of at least 0.")
        if self.teacher_cache is not None and (self.augment is not None or self.mixup or self.cutmix):
            raise ValueError(
                "teacher_cache holds what the teacher says of each image as it is loaded; augment, mixup and cutmix "
                "change images after that: leave them out, or put the augmentation into the dataset."
            )
        self._check_trackers()
        choice("unreadable", self.unreadable, ["error", "skip"])
        choice("teacher_placement", self.teacher_placement, ["device", "sharded", "offloaded"])
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must be between 0 and 1, for example 0.9999.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and less than 1.")
        if self.mixed_precision is not None:
            choice("mixed_precision", self.mixed_precision, ["no", "bf16", "fp16"])
        if isinstance(self.augment, str):
            choice("augment", self.augment, PRESETS)
        elif self.augment is not None and not callable(self.augment):
            raise TypeError(f"augment must be 'light', 'strong' or a function of a batch, got {self.augment!r}.")
        self._check_optimizer()

    def _check_trackers(self) -> None:
        from accelerate.tracking import get_available_trackers

        if isinstance(self.trackers, str):
            raise TypeError(f"trackers={self.trackers!r} must be a list: trackers=[{self.trackers!r}].")
        available = [str(name.value) for name in get_available_trackers()]
        for tracker in self.trackers:
            if isinstance(tracker, str) and tracker not in available:
                installed = ", ".join(available) or "none"
                raise ValueError(
                    f"trackers has {tracker!r}, which is not installed or unknown; installed: {installed}."
                )

    def _check_optimizer(self) -> None:
        from timm.optim import list_optimizers

        if isinstance(self.optimizer, Optimizer):
            name = type(self.optimizer).__name__
            raise TypeError(
                f"optimizer is a {name} object, whose parameters are chosen already: give its class, optimizer={name}, "
                "with optimizer_options={...}."
            )
        if not callable(self.optimizer) and self.optimizer not in list_optimizers():
            raise unknown_name("optimizer", self.optimizer, list_optimizers())
        _refuse_own_options(self.optimizer_options or {}, by_name=isinstance(self.optimizer, str))
        choice("scheduler", self.scheduler, ["cosine", "tanh", "step", "poly", "constant"])
        if self.lr is None and self.optimizer not in LEARNING_RATES:
            name = _word(self.optimizer)
            raise ValueError(f"lr=None, but optimizer {name!r} has no default learning rate here; set lr.")

    @property
    def keys(self) -> Keys:
        """Keys of image and label in samples that are dicts."""
        return Keys(self.image_key, self.label_key)

    @property
    def peak_lr(self) -> float:
        """The learning rate, or the optimizer's default."""
        return LEARNING_RATES[str(self.optimizer)] if self.lr is None else self.lr

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "TrainingOptions":
        """Build options from keywords.

        Raises:
            ValueError: If a name does not exist (the nearest ones are given) or a value is out of range.
        """
        check_option_names("option of fit", options, [field.name for field in fields(cls)])
        return cls(**options)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON values, for records of the run."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "lr": self.peak_lr,
            "optimizer": _word(self.optimizer),
            "optimizer_options": None if self.optimizer_options is None else dict(self.optimizer_options),
            "augment": _word(self.augment),
            "class_weights": self.class_weights or [],
            "trackers": [str(tracker) for tracker in self.trackers],
            "callbacks": [_word(type(each)) for each in self.callbacks],
            "teacher_cache": None if self.teacher_cache is None else str(self.teacher_cache),
        }


def _checked_weights(weights: list[float]) -> list[float]:
    strange = next((number for number, weight in enumerate(weights) if not 0 <= weight < math.inf), None)
    if strange is not None:
        raise ValueError(
            f"class_weights has {weights[strange]:g} for class {strange}: give numbers of at least 0, "
            "class_weights=[1.0, 0.5, ...]."
        )
    if not any(weights):
        raise ValueError("class_weights has only zeros, so no image counts: class_weights=[1.0, 0.5, ...].")
    return weights


def _refuse_own_options(given: Mapping[str, Any], *, by_name: bool) -> None:
    """Refuse options of the optimizer that `fit` sets by options of its own."""
    own = {"lr": "lr", "weight_decay": "weight_decay"}
    if by_name:
        own |= {"momentum": "momentum", "layer_decay": "layer_decay", "opt": "optimizer"}
    for name in given:
        if name in own:
            raise ValueError(
                f"optimizer_options has {name!r}, which is an option of fit itself: "
                f"fit(..., {own[name]}={given[name]!r})."
            )


def _word(value: Any) -> Any:
    """Return the name of a class or function, and what a module shows, without addresses; other values as they are."""
    if not callable(value):
        return value
    name = getattr(value, "__qualname__", None)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if name is None else f"{value.__module__}.{name}"
