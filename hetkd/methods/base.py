"""The base of all methods: what a method is given, what it returns, and the two terms on logits."""

import inspect
from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.adapter import Features, StagePair
from hetkd.names import Registry, unknown_name

Targets = dict[str, Tensor]
"""What `Method.encode` makes of the teacher's features: named tensors, batch first, without gradient."""

methods: Registry[type["Method"]] = Registry("method")
MethodClass = TypeVar("MethodClass", bound=type["Method"])


class Method(nn.Module, ABC):
    """A distillation method: teacher features to targets, student features and targets to loss terms.

    The base computes cross-entropy with the labels and KL divergence to the teacher's logits. A
    method on logits overrides `logit_loss`; a feature method adds `feature_terms` and, in `bind`,
    the parameters that these need.

    Args:
        ce_weight: Weight of the cross-entropy with the labels.
        kd_weight: Weight of the loss on logits: the KL divergence (Hinton et al., arXiv 1503.02531),
            batch mean times T^2, or what the method puts in its place.
        temperature: T, for both sides of the loss on logits.

    Attributes:
        automatic_stages: How many stage pairs, counted from the last, the method works on when
            the user names none.
        uses_teacher_maps: Whether it looks at the teacher's maps at these stages.
        uses_distillation_token: Whether a student with a distillation token trains its classifier on it.
        batch_is_local: Whether what it takes over the batch (`needs_batch`) is that of each process alone.
        logit_term: The name of the loss on logits among the terms.
        classes: Of the student, or ``None`` without a classifier; known before `bind`.
    """

    automatic_stages: ClassVar[int] = 0
    uses_teacher_maps: bool = True
    uses_distillation_token: bool = False
    batch_is_local: bool = False
    logit_term: ClassVar[str] = "kd"

    def __init__(self, *, ce_weight: float = 1.0, kd_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.ce_weight = not_negative("ce_weight", ce_weight)
        self.kd_weight = not_negative("kd_weight", kd_weight)
        self.temperature = positive("temperature", temperature)
        self.pairs: tuple[StagePair, ...] | None = None
        self.classes: int | None = None

    @property
    def uses_teacher(self) -> bool:
        """Whether the method looks at the teacher at all."""
        return self.uses_teacher_logits or self.compares_features

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether the teacher must have a classifier over the student's classes."""
        return self.kd_weight > 0

    @property
    def uses_student_logits(self) -> bool:
        """Whether the student must have a classifier, which then learns."""
        return self.ce_weight > 0 or self.kd_weight > 0

    @property
    def compares_features(self) -> bool:
        """Whether the method works on stage pairs."""
        return self.automatic_stages > 0

    @property
    def describes_logits(self) -> bool:
        """Whether the plan has a row for logits."""
        return self.kd_weight > 0

    @property
    def title(self) -> str:
        """The method as the plan names it."""
        return type(self).__name__

    @property
    def needs_batch(self) -> bool:
        """Whether the loss takes statistics over the batch, so that it needs more than one image."""
        return False

    def settings(self) -> dict[str, Any]:
        """Returns the name and the options of the method, for records of a run."""
        options = {name: getattr(self, name) for name in method_options(type(self)) if hasattr(self, name)}
        return {"name": type(self).__name__, **options}

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Returns the stage pairs to work on when the user names none.

        Args:
            pairs: The automatic pairing, in order of depth; empty where a model yields no feature map.
            pooled: The vectors before both classifiers, as maps of one pixel (without a classifier:
                the last map); ``None`` where a model has neither.
        """
        return list(pairs[-self.automatic_stages :]) if self.automatic_stages else []

    def teacher_stages(self) -> list[str]:
        """Returns the stages at which the teacher is tapped, in the order that `encode` expects."""
        return [pair.teacher.name for pair in self.pairs or ()] if self.uses_teacher_maps else []

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Makes the parameters for these stage pairs. Called once, by `hetkd.Distiller`.

        Raises:
            RuntimeError: If the method serves another distiller already.
        """
        if self.pairs is not None:
            raise RuntimeError(f"this {type(self).__name__} serves another Distiller already; make a new one.")
        self.pairs = tuple(pairs)

    def describe(self, index: int) -> str:
        """Returns what the plan says of stage pair ``index``, beside shapes."""
        return ""

    def added_parameters(self, index: int) -> int:
        """Returns the number of parameters that stage pair ``index`` adds to the training."""
        return 0

    def describe_logits(self) -> str:
        """Returns what the plan says of the logits."""
        return f"KL, T = {self.temperature:g}"

    @torch.no_grad()
    def encode(self, teacher: Features, /) -> Targets:
        """Turns teacher features into targets, without parameters and without gradient.

        Args:
            teacher: The maps of the teacher's stages of `pairs`, in their order, and its logits.

        Returns:
            Named tensors, each with the batch first; `encode` of a part of a batch is that part
            of the `encode` of the whole, so that targets can be cached per image.
        """
        targets: Targets = {}
        if self.uses_teacher_logits and teacher.logits is not None:
            targets["logits"] = teacher.logits.detach().float()
        for index, x in enumerate(teacher.maps):
            targets[f"stage{index}"] = self.encode_map(index, x.detach())
        return targets

    def encode_map(self, index: int, x: Tensor) -> Tensor:
        """Turns the teacher's map ``[B, C, h, w]`` of stage pair ``index`` into its target."""
        return x

    def forward(self, student: Features, targets: Targets, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the named, weighted terms of the loss.

        Args:
            student: The maps of the student's stages of `pairs`, in their order, and its logits.
            targets: What `encode` returned for the same images.
            labels: Class indices ``[B]`` (int64), class probabilities ``[B, classes]`` (mixing,
                label smoothing), or ``None``: no cross-entropy.

        Returns:
            Scalars in float32; their sum is the loss.
        """
        terms: dict[str, Tensor] = {}
        if labels is not None and self.ce_weight:
            terms["ce"] = self.ce_weight * F.cross_entropy(student_logits(student), labels)
        if self.kd_weight:
            terms[self.logit_term] = self.kd_weight * self.logit_loss(student, targets["logits"], labels)
        terms.update(self.feature_terms(student, targets, labels))
        return terms

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the loss on logits: T^2 KL(teacher || student) at temperature T, mean over the batch.

        Args:
            student: With its logits.
            teacher: Its logits ``[B, classes]``, float32.
            labels: As for `forward`; the divergence does not look at them.
        """
        log_student = F.log_softmax(student_logits(student) / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature**2

    def feature_terms(self, student: Features, targets: Targets, labels: Tensor | None) -> dict[str, Tensor]:
        """Returns the terms that compare features; none by default. Arguments as for `forward`."""
        return {}


def student_logits(student: Features) -> Tensor:
    """Returns the student's logits in float32.

    Raises:
        ValueError: If the student has no classifier.
    """
    if student.logits is None:
        raise ValueError("the student has no classifier: give it one with num_classes=...")
    return student.logits.float()


def target_classes(labels: Tensor | None, teacher: Tensor) -> Tensor:
    """Returns the class ``[B]`` that an image counts as, for methods that treat it apart from all others.

    Args:
        labels: Class indices, class probabilities (the likeliest class counts), or ``None``: then
            the teacher's class stands in.
        teacher: The teacher's logits ``[B, classes]``.
    """
    if labels is None:
        return teacher.argmax(1)
    return labels if labels.ndim == 1 else labels.argmax(1)


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Returns a class decorator that registers a `Method` under ``name``.

    Raises:
        ValueError: If the name is malformed or taken.
        TypeError: If what is decorated is not a subclass of `Method`.
    """
    add = methods.register(name)

    def decorate(method: MethodClass) -> MethodClass:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(f"method {name!r} must be a subclass of hetkd.Method, got {method!r}.")
        add(method)
        return method

    return decorate


def list_methods() -> list[str]:
    """Returns the names that ``Distiller(..., method=NAME)`` takes."""
    return methods.names()


def make_method(method: "str | Method", options: dict[str, Any]) -> Method:
    """Returns the method object for a name and its options; an object passes as it is.

    Raises:
        ValueError: If the name, an option's name or an option's value is not valid.
        TypeError: If ``method`` is neither a name nor a `Method`, or is an object and there are options.
    """
    if isinstance(method, Method):
        if options:
            raise TypeError(f"options {sorted(options)} belong in the method object: {type(method).__name__}(...).")
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method is the class {method.__name__}; give an object: {method.__name__}().")
    if not isinstance(method, str):
        raise TypeError(f"method must be a name (one of {list_methods()}) or a Method object, got {method!r}.")
    method_class = methods[method]
    check_option_names(f"option of method {method!r}", options, method_options(method_class))
    return method_class(**options)


def method_options(method_class: type[Method]) -> list[str]:
    """Returns the names of a method's keyword options."""
    return list(inspect.signature(method_class).parameters)


def check_option_names(what: str, options: Iterable[str], valid: Sequence[str]) -> None:
    """Raises ValueError, with the nearest valid names, for the first option that does not exist."""
    for option in options:
        if option not in valid:
            raise unknown_name(what, option, valid)


def not_negative(name: str, value: float) -> float:
    """Returns ``value``; raises ValueError if it is negative or not a number."""
    if not _number(name, value) >= 0:
        raise ValueError(f"{name}={value} must be 0 or positive.")
    return value


def whole_number(name: str, value: int) -> int:
    """Returns ``value``; raises ValueError unless it is a whole number of at least 1."""
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value


def needed_kd_weight(method: str, kd_weight: float) -> float:
    """Returns ``kd_weight``; raises ValueError for a 0 that would leave a method on logits without its only term."""
    if kd_weight == 0:
        raise ValueError(f"kd_weight=0 leaves method {method!r} without a teacher; use method 'ce'.")
    return kd_weight


def one_positive(**values: float) -> None:
    """Raises ValueError if all values are 0."""
    if not any(values.values()):
        raise ValueError(f"{' and '.join(values)} are all 0, which leaves nothing to compare.")


def positive(name: str, value: float) -> float:
    """Returns ``value``; raises ValueError unless it is positive."""
    if not _number(name, value) > 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def _number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number.")
    return value
