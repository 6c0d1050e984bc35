"""Clear errors for misspelt names, and the registry that refuses bad ones."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_VALID_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def unknown_name(what: str, value: object, valid: Iterable[str]) -> ValueError:
    """Build the error for a name that does not exist.

    Args:
        what: What the name stands for, as the user knows it (``"method"``, ``"timm model"``).
        value: What was given.
        valid: The names that would have been accepted.

    Returns:
        An error whose message has the nearest valid names or, where there are few, all of them.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(value), names, n=4, cutoff=0.5)
    near = near or [name for name in names if name.lower() == str(value).lower()]
    if near:
        hint = f"did you mean {_listed(near, 'or')}?"
    elif len(names) <= 40:
        hint = f"valid: {_listed(names, 'and')}." if names else "there are none."
    else:
        hint = f"none of the {len(names)} valid names is close to it."
    return ValueError(f"unknown {what} {value!r}: {hint}")


def choice(what: str, value: str, valid: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``valid``; raises the error of `unknown_name` otherwise."""
    names = list(valid)
    if value not in names:
        raise unknown_name(what, value, names)
    return value


def _listed(names: list[str], conjunction: str) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"


class Registry(Generic[T]):
    """Named things of one kind; duplicate and malformed names are refused."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under ``name``.

        Raises:
            ValueError: If ``name`` is malformed or already taken.
        """
        if not _VALID_NAME.fullmatch(name):
            raise ValueError(
                f"{self.what} name {name!r} is malformed: use lower-case letters, digits, '_' and '-', a letter first."
            )
        if name in self._items:
            raise ValueError(
                f"{self.what} {name!r} is already registered as {self._items[name]!r}; choose another name."
            )

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise unknown_name(self.what, name, self._items)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._items)


_OTHER_WORDS = {
    "lr": ("learning_rate", "learningrate", "base_lr", "max_lr"),
    "mixed_precision": ("amp", "fp16", "bf16", "precision", "half", "autocast"),
    "cpu": ("device", "no_cuda", "use_cpu", "gpu", "cuda"),
    "output_dir": ("save_dir", "out_dir", "output", "save_path", "checkpoint_dir", "logdir"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    "num_workers": ("workers", "n_workers", "dataloader_num_workers"),
    "batch_size": ("bs", "per_device_train_batch_size", "train_batch_size"),
    "gradient_accumulation": ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum"),
    "clip_grad": ("max_grad_norm", "gradient_clip_val", "grad_clip"),
    "weight_decay": ("wd",),
    "trackers": ("report_to", "logger", "loggers", "wandb", "tensorboard"),
    "warmup_epochs": ("warmup", "warmup_ratio", "warmup_steps"),
    "augment": ("augmentation", "aug", "transform", "transforms"),
    "temperature": ("tau", "t"),
    "kd_weight": ("alpha", "lambda_kd", "distill_weight"),
    "feature_weight": ("beta", "lambda_feat", "loss_weight"),
    "stages": ("layers", "hint_layers", "feature_layers"),
}
"""What other libraries call our options."""


def check_option_names(what: str, options: Iterable[str], valid: Sequence[str]) -> None:
    """Raise ValueError, with the nearest valid names, for the first option that does not exist."""
    for option in options:
        if option in valid:
            continue
        ours = [name for name in valid if option.lower() in _OTHER_WORDS.get(name, ())]
        if ours:
            raise ValueError(f"unknown {what} {option!r}: it is called {_listed(ours, 'or')} here.")
        raise unknown_name(what, option, valid)


def not_negative(name: str, value: float) -> float:
    """Return ``value``; raises ValueError if it is negative or not a number."""
    if not _number(name, value) >= 0:
        raise ValueError(f"{name}={value} must be 0 or positive.")
    return value


def whole_number(name: str, value: int) -> int:
    """Return ``value``; raises ValueError unless it is a whole number of at least 1."""
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value


def one_positive(**values: float) -> None:
    """Raise ValueError if all values are 0."""
    if not any(values.values()):
        raise ValueError(f"{' and '.join(values)} are all 0, which leaves nothing to compare.")


def positive(name: str, value: float) -> float:
    """Return ``value``; raises ValueError unless it is positive."""
    if not _number(name, value) > 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def _number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number.")
    return value
