"""The base of all methods: what a method is given, what it returns, and the two terms on logits."""

import inspect
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import Features, StagePair
from hetkd.spectral.precision import at_least_float32
from hetkd.tasks import Classification, Task
from hetkd.utils.checks import Registry, check_option_names, not_negative, positive

Targets = dict[str, Tensor]
"""Targets that `Method.encode` makes from the teacher's features: named tensors, batch first, without gradient."""

methods: Registry[type["Method"]] = Registry("method")
MethodClass = TypeVar("MethodClass", bound=type["Method"])


def _with_options_of_bases(method_class: type["Method"]) -> inspect.Signature:
    """Return the signature of a class whose ``**common`` goes to its base, with the options of that base."""
    own = dict(list(inspect.signature(method_class.__init__).parameters.items())[1:])
    rest = [name for name, option in own.items() if option.kind is option.VAR_KEYWORD]
    if not rest:
        return inspect.Signature(list(own.values()))
    del own[rest[0]]
    of_base = dict(inspect.signature(method_class.__mro__[1]).parameters)
    shared = {name: own.pop(name, option) for name, option in of_base.items()}
    return inspect.Signature([*own.values(), *shared.values()])


class Method(nn.Module, ABC):
    """A distillation method: teacher features to targets, student features and targets to loss terms.

    The base computes cross-entropy with the labels and KL divergence to the teacher's logits. A method on logits
    overrides `logit_loss`; a feature method adds `feature_terms` and, in `bind`, the parameters that they need. A
    subclass takes its own options by keyword and hands the rest on: ``super().__init__(**common)``.

    Args:
        ce_weight: Weight of the cross-entropy with the labels.
        kd_weight: Weight of the loss on logits: the KL divergence (Hinton et al., arXiv 1503.02531), batch mean times
            T^2, or the loss that replaces it.
        temperature: T, which divides the logits of both sides in the loss on logits.

    Attributes:
        automatic_stages: Number of stage pairs, counted from the last, when the user names none.
        uses_distillation_token: Whether a student with a distillation token trains its classifier on it.
        batch_statistics: The batch over which the loss takes statistics, which then needs two images or more: that of
            each ``"process"``, or of ``"all"`` processes together; ``None`` without such statistics.
        logit_term: Name of the loss on logits among the terms.
        pairs: The stage pairs, known after `bind`.
        classes: Number of the student's classes, or ``None`` without a classifier; known before `bind`.
        class_weights: ``[classes]``, weights in the cross-entropy, or ``None``: all alike.
        task: Says what labels and logits are; known before `bind`.
        tasks: Names of the tasks that the method is for.
    """

    automatic_stages: ClassVar[int] = 0
    tasks: ClassVar[tuple[str, ...]] = ("classification", "segmentation")
    uses_distillation_token: bool = False
    batch_statistics: str | None = None
    logit_term: ClassVar[str] = "kd"
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class the signature with all its options: its own, then those of its bases."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _with_options_of_bases(cls)

    def __init__(self, *, ce_weight: float = 1.0, kd_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.ce_weight = not_negative("ce_weight", ce_weight)
        self.kd_weight = not_negative("kd_weight", kd_weight)
        self.temperature = positive("temperature", temperature)
        self.pairs: tuple[StagePair, ...] | None = None
        self.classes: int | None = None
        self.class_weights: Tensor | None = None
        self.task: Task = Classification()

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
    def title(self) -> str:
        """The name of the method in the plan."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """Return the name and the options of the method, for records of a run."""
        options = {name: getattr(self, name) for name in method_options(type(self)) if hasattr(self, name)}
        return {"name": type(self).__name__, **options}

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Return the stage pairs to work on when the user names none.

        Args:
            pairs: The automatic pairing, in order of depth; empty where a model yields no feature map.
            pooled: The vectors before both classifiers, as maps of one pixel (without a classifier: the last map);
                ``None`` where a model has neither.
        """
        return list(pairs[-self.automatic_stages :]) if self.automatic_stages else []

    def teacher_stages(self) -> list[str]:
        """Return the stages at which the teacher is tapped, in the order that `encode` expects."""
        return [pair.teacher.name for pair in self.pairs or ()]

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the parameters for these stage pairs. `hetkd.Distiller` calls it once.

        Raises:
            RuntimeError: If the method serves another distiller already.
        """
        if self.pairs is not None:
            raise RuntimeError(f"this {type(self).__name__} serves another Distiller already; make a new one.")
        self.pairs = tuple(pairs)

    def describe_pair(self, index: int) -> str:
        """Return the plan's words on stage pair ``index``, beside shapes."""
        return ""

    def describe_logits(self) -> str:
        """Return the plan's words on the logits; an empty string leaves their row out."""
        return f"KL, T = {self.temperature:g}" if self.kd_weight else ""

    def remark(self) -> str:
        """Return what the plan says below its table; an empty string for nothing."""
        return ""

    def added_parameters(self, index: int) -> int:
        """Return the number of parameters that stage pair ``index`` adds to the training."""
        return 0

    @torch.no_grad()
    def encode(self, teacher: Features, /) -> Targets:
        """Turn teacher features into targets, without parameters and without gradient.

        Args:
            teacher: The maps of the stages of `teacher_stages`, in their order, and the logits.

        Returns:
            Named tensors, batch first. The `encode` of a part of a batch is that part of the `encode` of the whole, so
            that targets can be cached per image.
        """
        targets: Targets = {}
        if self.uses_teacher_logits and teacher.logits is not None:
            targets["logits"] = self.task.compact(at_least_float32(teacher.logits.detach()))
        for index, x in enumerate(teacher.maps):
            with torch.autocast(x.device.type, enabled=False):
                targets[f"stage{index}"] = self.encode_stage(index, at_least_float32(x.detach()))
        return targets

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Turn the teacher's map ``[B, C_t, h, w]`` (float32, autocast off) of a stage pair into its target."""
        return x

    def describe_targets(self, source: int = 0) -> dict[str, dict[str, Any]]:
        """Return what each target of `encode` is made of, as JSON values: targets alike in this are the same.

        Args:
            source: Number of the teacher, of several.
        """
        logits = {"logits": {"teacher": source, "what": "logits"}} if self.uses_teacher_logits else {}
        stages = {
            f"stage{index}": {"teacher": source, "stage": str(pair.teacher), **self.describe_target(index)}
            for index, pair in enumerate(self.pairs or () if self.teacher_stages() else ())
        }
        return {**logits, **stages}

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return what `encode_stage` makes of the map of stage pair ``index``; by default what this method does."""
        options = {
            name: value
            for name, value in self.settings().items()
            if name != "temperature" and not name.endswith(("_weight", "_weights"))
        }
        return {"what": options.pop("name"), **options, "student": str((self.pairs or ())[index].student)}

    def forward(self, student: Features, targets: Targets, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the named, weighted terms of the loss.

        Args:
            student: The maps of the student's stages of `pairs`, in their order, and its logits.
            targets: The result of `encode` for the same images.
            labels: Class indices ``[B]`` (int64), class probabilities ``[B, classes]`` (mixing, label smoothing), masks
                ``[B, H, W]`` of a segmenter, or ``None``: no cross-entropy.

        Returns:
            Scalars in float32; their sum is the loss.
        """
        terms: dict[str, Tensor] = {}
        if labels is not None and self.ce_weight:
            ce = self.task.cross_entropy(student_logits(student), labels, self.class_weights)
            terms["ce"] = self.ce_weight * ce
        if self.kd_weight:
            terms[self.logit_term] = self.kd_weight * self.compare_logits(student, targets["logits"], labels)
        terms.update(self.feature_terms(student, targets, labels))
        return terms

    def compare_logits(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return `logit_loss` of what the task compares: images of a classifier, valid pixels of a segmenter."""
        compared = self.task.compared_logits(student_logits(student), teacher, labels)
        return self.logit_loss(replace(student, logits=compared.student), compared.teacher, compared.labels)

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss on logits: T^2 KL(teacher || student) at temperature T, mean over the batch.

        Args:
            student: Features with logits.
            teacher: Logits ``[B, classes]``, float32.
            labels: As for `forward`; the divergence does not look at them.
        """
        log_student = F.log_softmax(student_logits(student) / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature**2

    def feature_terms(self, student: Features, targets: Targets, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the terms that compare features; none by default. Arguments as for `forward`."""
        return {}


class LogitMethod(Method):
    """Base of methods whose loss on logits is all that the teacher teaches; arguments as of `Method`."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        if not self.kd_weight:
            name = type(self).__name__.lower()
            raise ValueError(f"kd_weight=0 leaves method {name!r} without a teacher; use method 'ce'.")


def student_logits(student: Features) -> Tensor:
    """Return the student's logits in float32, or float64 if they are.

    Raises:
        ValueError: If the student has no classifier.
    """
    if student.logits is None:
        raise ValueError("the student has no classifier: give it one with num_classes=...")
    return at_least_float32(student.logits)


def target_classes(labels: Tensor | None, teacher: Tensor) -> Tensor:
    """Return the class ``[B]`` of each image, for methods that treat that class apart from all others.

    Args:
        labels: Class indices, class probabilities (the likeliest class counts), or ``None``: the teacher's class stands
            in.
        teacher: The teacher's logits ``[B, classes]``.
    """
    if labels is None:
        return teacher.argmax(1)
    return labels if labels.ndim == 1 else labels.argmax(1)


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that registers a `Method` under ``name``.

    Raises:
        ValueError: If the name is malformed or taken.
        TypeError: If the decorated object is not a subclass of `Method`.

    Example:
        >>> @register_method("halved-example")
        ... class Halved(Method):
        ...     def logit_loss(self, student, teacher, labels):
        ...         return super().logit_loss(student, teacher, labels) / 2
        >>> "halved-example" in list_methods()
        True
    """
    add = methods.register(name)

    def decorate(method: MethodClass) -> MethodClass:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(f"method {name!r} must be a subclass of hetkd.Method, got {method!r}.")
        add(method)
        return method

    return decorate


def list_methods(task: str | None = None) -> list[str]:
    """Return the names that ``Distiller(..., method=NAME)`` takes.

    Args:
        task: Only the methods for ``"classification"`` or ``"segmentation"``; ``None``: all.

    Example:
        >>> "sfkd" in list_methods()
        True
        >>> "cwd" in list_methods("classification")
        False
    """
    return [name for name in methods.names() if task is None or task in methods[name].tasks]


def make_method(method: "str | Method", options: dict[str, Any]) -> Method:
    """Return the method object for a name and its options; an object passes as it is.

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


def method_defaults(class_name: str) -> dict[str, Any]:
    """Return the defaults of the options of the registered method with this class name, as JSON values."""
    found = [methods[name] for name in methods.names() if methods[name].__name__ == class_name]
    signature = inspect.signature(found[0]).parameters if found else {}
    return {name: option.default for name, option in signature.items() if option.default is not option.empty}


def method_options(method_class: type[Method]) -> list[str]:
    """Return the names of a method's keyword options."""
    return list(inspect.signature(method_class).parameters)
