"""The training step: encode the images by the teachers, run the student, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.assemble import assemble
from hetkd.features.hooks import both_classifiers, eval_mode
from hetkd.features.pairing import StageChoice
from hetkd.features.tap import Size, Tap
from hetkd.methods.common.method import Method
from hetkd.models.description import Description, describe
from hetkd.models.inputs import Normalization, check_images
from hetkd.models.load import change_classes
from hetkd.models.wrappers import tapped_module
from hetkd.tasks import Task
from hetkd.teachers import Encoded
from hetkd.utils.compiling import blocks, compile_parts, warn_if_inert
from hetkd.utils.distributed import world_size


@dataclass(frozen=True)
class DistillerOutput:
    """The result of one training step's forward.

    Attributes:
        loss: The sum of ``terms``.
        terms: Named, weighted scalars in float32, with gradient.
        student_logits: ``[B, classes]``, or ``None`` for a student without a classifier.
        teacher_logits: ``[B, classes]``, or ``None`` where the teacher has none or was not run.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    student_logits: Tensor | None
    teacher_logits: Tensor | None


class Distillation(nn.Module):
    """The training step of a `hetkd.Distiller`, which adds training, evaluation and files; arguments as there.

    The teacher is frozen, stays in eval mode and is in no ``parameters()``, ``state_dict()`` or DDP bucket; it moves
    with this module between devices and keeps its own dtype.
    """

    def __init__(
        self,
        teacher: str | nn.Module | Sequence[str | nn.Module] | None,
        student: str | nn.Module,
        method: str | Method | Sequence[str | Method] = "sfkd",
        *,
        num_classes: int | None = None,
        stages: Sequence[StageChoice] | None = None,
        teacher_weights: Sequence[float] | None = None,
        input_size: Size | Mapping[str, Any] | None = None,
        normalized: Normalization | None = None,
        teacher_classes: int | None = None,
        task: str | Task | None = None,
        **method_options: Any,
    ) -> None:
        super().__init__()
        parts = assemble(
            teacher,
            student,
            method,
            num_classes=num_classes,
            stages=stages,
            teacher_weights=teacher_weights,
            input_size=input_size,
            normalized=normalized,
            teacher_classes=teacher_classes,
            task=task,
            method_options=method_options,
        )
        self.student, self.student_tap = parts.student, parts.student_tap
        self.student_inputs = parts.student_tap.inputs
        self.teachers, self.method, self.plan = parts.teachers, parts.method, parts.plan
        self.classes_from_data = parts.classes_from_data
        self.normalization, self.normalized = normalized, normalized is not None
        self.class_names: list[str] | None = None  # in the order of the logits, once training data tell them
        self.trained: dict[str, Any] = {}  # what `fit` has to say of the student: epochs, accuracy, data
        self.history: list[dict[str, float]] = []  # of the last `fit`, one record an epoch
        self._looked_at_values = False
        self._compiled_anew = False
        self.to(self.student_tap.device)  # new parameters follow models that were on their device before

    def forward(
        self, images: Tensor, labels: Tensor | None = None, targets: Mapping[str, Tensor] | None = None
    ) -> DistillerOutput:
        """Compute the loss of one training step.

        Args:
            images: ``[B, C, H, W]``, float in [0, 1] (or as ``normalized`` says) or uint8.
            labels: Classes ``[B]`` (int64), class probabilities ``[B, classes]``, or ``None`` for learning without
                labels: no cross-entropy.
            targets: Targets that the method's ``encode`` made of these images before (`hetkd.Distiller.cache_teacher`);
                then the teacher is not run.

        Raises:
            TypeError: If images or labels have a wrong dtype.
            ValueError: If images have a wrong rank, channel count or range, or labels a wrong shape or range.
        """
        self._check(images, labels)
        encoded = self.teachers.encode(images) if targets is None else Encoded(dict(targets), targets.get("logits"))
        with both_classifiers(self.student_tap.model, enabled=self.method.uses_distillation_token):
            student = self.student_tap.run(images)
        terms = self.method(student, encoded.targets, labels)
        if not terms:
            raise ValueError("there is nothing to learn from: no labels, and the method has no term without them.")
        if self._compiled_anew:
            self._compiled_anew = False
            warn_if_inert()
        return DistillerOutput(torch.stack(list(terms.values())).sum(), terms, student.logits, encoded.logits)

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        look = not self._looked_at_values
        check_images(images, self.student_tap.spec.channels, look_at_values=look, normalized=self.normalized)
        if labels is not None:
            self.task.check_labels(labels, images, self.classes, look or labels.device.type == "cpu")
        self._looked_at_values = True
        scope = self.method.batch_statistics
        if self.training and scope and len(images) * (world_size() if scope == "all" else 1) < 2:
            raise ValueError(
                f"a batch of one image has no statistics, which {self.method.title} needs: use larger batches "
                "(drop_last=True for the last one)."
            )

    def look_at_values_again(self) -> None:
        """Check the range of the next images and labels, as of the first ones: data come from elsewhere now."""
        self._looked_at_values = False

    def predict(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return the logits ``[B, classes]`` of the student, in eval mode, for raw images.

        Args:
            images: As for `forward`.
            model: Another module of the student's architecture (an average of its weights).

        Raises:
            ValueError: If the student has no classifier, or images have a wrong rank, channel count or range.
        """
        check_images(images, self.student_tap.spec.channels, look_at_values=True, normalized=self.normalized)
        return self.predict_checked(images, model)

    def predict_checked(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return what `predict` does for images that were looked at before."""
        student = self.student_tap.model if model is None else tapped_module(model)
        with eval_mode(student):
            logits = self.student_tap.adapter.run(student, self.student_tap.prepare(images), ()).logits
        if logits is None:
            raise ValueError("the student has no classifier: give it one with num_classes=...")
        return logits

    def compile(self, **options: Any) -> None:
        """Compile the blocks of the teachers and of the student, and the method, in place.

        Features between blocks are tapped as before, and equal blocks share one compilation. Evaluation, DDP and saved
        weights do not change. It takes a minute before the first step; whether it pays depends on the device
        (``docs/research/performance.md``).

        Args:
            **options: Options of ``torch.compile``: ``mode``, ``backend``, ``dynamic`` (here ``False`` by default), ...

        Warns:
            RuntimeWarning: If a model has no blocks, or, after the first step, if nothing was compiled.
        """
        options.setdefault("dynamic", False)  # PyTorch's compiler fails on some models with dynamic shapes
        models = {tap.role: blocks(tap.model) for tap in (*self.teachers.live, self.student_tap)}
        compile_parts({**models, "method": [self.method]}, options)
        self._compiled_anew = True

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher module, frozen, in eval mode; of several the first; ``None`` without one or of a cache alone."""
        return next(iter(self.teachers), None)

    @property
    def taps(self) -> dict[str, Tap]:
        """Adapter, stages and input transform of ``"student"`` and, if the method has one, ``"teacher"``.

        Several teachers are ``"teacher0"``, ``"teacher1"`` and so on.
        """
        return {tap.role: tap for tap in (*self.teachers.taps, self.student_tap)}

    def describe_student(self) -> Description:
        """Return what a file of the student says of it: how it is built, its images, its classes, how it was made."""
        made = {"plan": self.plan.title, "method": self.method.settings(), "hetkd": version("hetkd"), **self.trained}
        size, spec = self.student_tap.size, self.student_inputs.spec
        known: dict[str, Any] = {"num_classes": self.classes, "classes": self.class_names}
        return describe(self.student, size=size, spec=spec, made=made, **known)

    @property
    def task(self) -> Task:
        """What labels and logits are."""
        return self.method.task

    @property
    def classes(self) -> int | None:
        """The number of classes of the student; ``None`` without a classifier."""
        return self.student_tap.classes

    def set_classes(self, classes: int) -> None:
        """Give a student that was built from a name, and whose logits no teacher is compared with, other classes."""
        if classes != self.classes and self.classes is not None:
            change_classes(self.student, classes)
            self.student_tap.model = tapped_module(self.student)
            self.student_tap.classes = self.method.classes = classes

    @property
    def loading_size(self) -> tuple[int, int]:
        """Height and width that training images need so that neither model sees them enlarged."""
        sizes = [tap.size for tap in self.taps.values()]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the student wants no weight decay for (timm's convention)."""
        names: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher" or (name in ("student", "method", "teachers") and name in vars(self).get("_modules", {})):
            raise AttributeError(f"the {name} of a distiller is fixed: make a new Distiller.")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distillation:
        if fn(torch.zeros(())).dtype in (torch.float16, torch.bfloat16):
            # Methods compute in float32 whatever the student's dtype; a detour by half precision would round them.
            for part in (self.student, self.student_inputs):
                part._apply(fn, recurse)
            self.method.to(self.student_tap.device)
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.student_tap.device.type != "meta":
            self.teachers.to(self.student_tap.device)
        return self
