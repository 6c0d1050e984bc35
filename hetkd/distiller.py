"""The distiller: two models, a method, and what is matched with what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetkd.adapter import Features, StagePair, both_classifiers, eval_mode
from hetkd.compiling import blocks, compile_parts, warn_if_inert
from hetkd.distributed import world_size
from hetkd.inputs import Normalization, check_images, check_labels
from hetkd.methods import Combined, Method, MultiTeacher, make_method
from hetkd.methods.base import whole_number
from hetkd.methods.feature import count_parameters
from hetkd.models import copy_label_names, load_model, save_model, tapped_module, unwrap
from hetkd.names import choice, unknown_name
from hetkd.plan import POOLED, Plan, PlanRow, StageChoice, chosen_names, chosen_pairs, pair_stages
from hetkd.tap import RecordedTap, RecordedTeacher, Size, Tap

if TYPE_CHECKING:
    from hetkd.training.loop import FitResult


_CACHE = "cache:"


@dataclass(frozen=True)
class DistillerOutput:
    """What one training step's forward yields.

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


class Distiller(nn.Module):
    """Distils a teacher into a student of any architecture.

    The teacher is frozen, stays in eval mode and is no part of `parameters`, `state_dict` or what
    DDP sees; it moves with the distiller between devices and keeps its own dtype.

    Args:
        teacher: ``"timm:NAME"`` (or a bare timm name), ``"hf:ORG/NAME"``, ``"torchvision:NAME"``,
            each with pretrained weights, or any ``nn.Module``. ``None`` for ``method="ce"`` only. A list
            of them: several teachers, each with its own input transform and a copy of the method.
            ``"cache:FOLDER"``: what `cache_teacher` wrote there, in the place of the teachers themselves.
        student: The same, but strings build it without pretrained weights (`hetkd.load_model` for
            anything else), with as many classes as ``num_classes`` or else the teacher.
        method: A name of `hetkd.list_methods`, a `hetkd.Method` object, or a list of both, which
            `hetkd.Combined` adds up.
        num_classes: Classes of a student given as a string.
        stages: Overrides the automatic pairing: rows of it (``[2, 3]``), student stages by name, or
            ``(teacher, student)`` pairs of names. Names are those of the plan, or paths of any
            modules that yield feature maps (``"layer4.1"``).
        teacher_weights: Of several teachers, a factor for the terms of each; ``None``: equal ones, in all 1.
        input_size: Pixels, a number or ``(height, width)``, for the student; or
            ``{"teacher": ..., "student": ...}``, with a list of sizes for several teachers. Each model defaults
            to the size it was made for; images of other sizes are resized for each model.
        normalized: ``(mean, std)`` that the loader normalised the images with. Otherwise images
            are float in [0, 1] or uint8. Each model gets its own normalisation.
        **method_options: Options of the method, when it is given by name.

    Attributes:
        student: The plain student module.
        method: The method, with what it learns beside the student.
        plan: What is matched with what; print it.
        normalized: Whether images come normalised.

    Raises:
        ValueError: If a name or option does not exist, the models' class counts differ under a
            loss on logits, the teacher lacks a classifier that the method needs, a model refuses
            the input size, or a grid is too small. All of this before any training.
        TypeError: If an argument is of a wrong type.
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
        **method_options: Any,
    ) -> None:
        super().__init__()
        teachers: list[Any] = list(teacher) if isinstance(teacher, (list, tuple)) else _recorded(teacher)
        if not teachers:
            raise ValueError("teacher=[] is an empty list: give one teacher or several.")
        made = _make_method(method, method_options, len(teachers), teacher_weights)
        sizes = _sizes(input_size)
        taps = _teacher_taps(teachers, made, sizes.get("teacher"), normalized)
        if isinstance(student, str):
            classes = taps[0].classes if num_classes is None and taps else num_classes
            student = load_model(student, pretrained=False, num_classes=classes)
            if taps and not isinstance(taps[0], RecordedTap):
                copy_label_names(taps[0].model, student)
        elif num_classes is not None:
            raise ValueError("num_classes is for a student given as a string; a module keeps the classes it has.")
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a string or an nn.Module, got {student!r}.")
        if any(tapped_module(student) is tap.model for tap in taps):
            raise ValueError("teacher and student are the same module; pass a copy.deepcopy as the student.")
        self.student = unwrap(student)
        self.normalized = normalized is not None
        # A tap is no nn.Module: the teacher is in no parameters(), state_dict() or DDP bucket.
        self._teachers = taps if made.uses_teacher else []
        self._student = Tap("student", student, sizes.get("student"), normalized)
        self.student_inputs = self._student.inputs
        self.method = made
        self._bind(stages)
        self.plan = self._make_plan()
        self._looked_at_values = False
        self._compiled_anew = False
        self.to(self._student.device)  # what was made here follows models that were on their device before

    def _bind(self, stages: Sequence[StageChoice] | None) -> None:
        student, method = self._student, self.method
        if student.classes is None and (method.uses_student_logits or method.uses_teacher_logits):
            raise ValueError("the student has no classifier: give it one with num_classes=...")
        student.add_stages(chosen_names(stages, 1))
        method.classes = student.classes
        parts = method.methods if isinstance(method, MultiTeacher) else [method]
        pairs = [self._pair_with(tap, part, stages) for tap, part in zip(self._teachers, parts, strict=False)] or [[]]
        method.bind(*pairs)
        student.select([pair.student.name for pair in method.pairs or ()])
        for tap, part in zip(self._teachers, parts, strict=False):
            tap.select(part.teacher_stages())

    def _pair_with(self, teacher: Tap, method: Any, stages: Sequence[StageChoice] | None) -> list[StagePair]:
        """Chooses the stage pairs of one teacher."""
        student = self._student
        if teacher.spec.channels != student.spec.channels:
            raise ValueError(
                f"the {teacher.role} takes images of {teacher.spec.channels} channels and the student of "
                f"{student.spec.channels}: build one of them with load_model(..., in_chans=...)."
            )
        if method.uses_teacher_logits:
            _check_classes(teacher, student)
        if not method.compares_features:
            if stages is not None:
                raise ValueError(f"stages={stages!r} has no use: {type(method).__name__} compares no features.")
            return []
        teacher.add_stages(chosen_names(stages, 0))
        if stages is not None:
            return chosen_pairs(teacher.all_stages, student.all_stages, stages, (teacher.listed, student.listed))
        pairs: list[StagePair] = method.automatic_pairs(
            pair_stages(teacher.listed, student.listed), _pooled_pair(teacher, student)
        )
        if not pairs:
            reason = teacher.why_no_stages or student.why_no_stages or "no stages fit each other"
            raise ValueError(f"{reason}, but {type(method).__name__} compares feature maps: use method='kd'.")
        return pairs

    def _make_plan(self) -> Plan:
        student, method = self._student, self.method
        rows = []
        for index, (teacher, pair) in enumerate(zip(self._teacher_of_pair(), method.pairs or (), strict=True)):
            automatic = pair_stages(teacher.listed, student.listed)
            row = str(automatic.index(pair)) if pair in automatic else "own"
            name = pair.teacher.name if len(self._teachers) == 1 else f"{teacher.role}: {pair.teacher.name}"
            shape: tuple[int, ...] = (pair.teacher.channels, *pair.teacher.grid)
            if pair.teacher.name not in teacher.names:  # the method learns from logits here
                name, shape = "logits", (teacher.classes or 0,)
            rows.append(
                PlanRow(
                    "pooled" if POOLED in (pair.teacher.name, pair.student.name) else row,
                    name,
                    shape,
                    pair.student.name,
                    (pair.student.channels, *pair.student.grid),
                    method.describe(index),
                    method.added_parameters(index),
                )
            )
        for teacher in self._teachers if method.describes_logits else []:
            name = "" if len(self._teachers) == 1 else teacher.role
            classes = ((teacher.classes or 0,), (student.classes or 0,))
            rows.append(PlanRow("logits", name, classes[0], "", classes[1], method.describe_logits(), 0))
        teachers = " + ".join(teacher.title for teacher in self._teachers) or "no teacher"
        title = f"{teachers} -> {student.title}, method {method.title}"
        return Plan(title, tuple(rows), count_parameters(method))

    def _teacher_of_pair(self) -> list[Tap]:
        if not isinstance(self.method, MultiTeacher):
            return self._teachers[:1] * len(self.method.pairs or ())
        counts = self.method.pair_counts
        return [tap for tap, count in zip(self._teachers, counts, strict=True) for _ in range(count)]

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher module, frozen, in eval mode; of several the first; ``None`` without one or of a cache alone."""
        return next(iter(self.teachers), None)

    @property
    def teachers(self) -> list[nn.Module]:
        """All teacher modules."""
        return [tap.model for tap in self._teachers if not isinstance(tap, RecordedTap)]

    @property
    def taps(self) -> dict[str, Tap]:
        """How ``"teacher"`` (if the method has one) and ``"student"`` are run: adapter, stages, input transform.

        Several teachers are ``"teacher0"``, ``"teacher1"`` and so on.
        """
        return {tap.role: tap for tap in (*self._teachers, self._student)}

    @property
    def classes(self) -> int | None:
        """The number of classes of the student; ``None`` without a classifier."""
        return self._student.classes

    @property
    def loading_size(self) -> tuple[int, int]:
        """Height and width that training images need so that neither model sees them enlarged."""
        sizes = [tap.size for tap in self.taps.values()]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, targets: Mapping[str, Tensor] | None = None
    ) -> DistillerOutput:
        """Computes the loss of one training step.

        Args:
            images: ``[B, C, H, W]``, float in [0, 1] (or as ``normalized`` says) or uint8.
            labels: Classes ``[B]`` (int64), class probabilities ``[B, classes]``, or ``None`` for
                learning without labels: no cross-entropy.
            targets: What the method's ``encode`` made of these images before (`cache_teacher`); then the
                teacher is not run.

        Raises:
            TypeError: If images or labels have a wrong dtype.
            ValueError: If images have a wrong rank, channel count or range, or labels a wrong shape or range.
        """
        self._check(images, labels)
        compared = len(images) if self.method.batch_is_local else len(images) * world_size()
        if self.training and self.method.needs_batch and compared < 2:
            raise ValueError(
                f"a batch of one image has no statistics, which {self.method.title} needs: use larger batches "
                "(drop_last=True for the last one)."
            )
        teacher_logits = None if targets is None else targets.get("logits")
        if targets is None and self._teachers:
            with torch.no_grad():
                features = [teacher.run(images) for teacher in self._teachers]
                targets, teacher_logits = self.method.encode(*features), _joint_logits(features)
        with both_classifiers(self._student.model, enabled=self.method.uses_distillation_token):
            student = self._student.run(images)
        terms = self.method(student, targets or {}, labels)
        if not terms:
            raise ValueError("there is nothing to learn from: no labels, and the method has no term without them.")
        if self._compiled_anew:
            self._compiled_anew = False
            warn_if_inert()
        return DistillerOutput(torch.stack(list(terms.values())).sum(), terms, student.logits, teacher_logits)

    def compile(self, **options: Any) -> None:
        """Compiles the blocks of the teachers and of the student, and the method, in place.

        Block by block, what taps features between blocks keeps working, and equal blocks share one compilation.
        Evaluation, DDP and saved weights see nothing of it. It takes a minute before the first step; whether it pays
        depends on the device (``docs/performance.md``).

        Args:
            **options: Of ``torch.compile``: ``mode``, ``dynamic``, ``backend``, ...

        Warns:
            RuntimeWarning: If a model has no blocks, or, after the first step, if nothing was compiled.
        """
        teachers = [tap for tap in self._teachers if not isinstance(tap, RecordedTap)]
        models = {tap.role: blocks(tap.model) for tap in (*teachers, self._student)}
        compile_parts({**models, "method": [self.method]}, options)
        self._compiled_anew = True

    def predict(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Returns the logits ``[B, classes]`` of the student, in eval mode, for raw images.

        Args:
            images: As for `forward`.
            model: Another module of the student's architecture (an average of its weights).

        Raises:
            ValueError: If the student has no classifier.
        """
        student = self._student.model if model is None else tapped_module(model)
        with eval_mode(student):
            logits = self._student.adapter.run(student, self._student.prepare(images), ()).logits
        if logits is None:
            raise ValueError("the student has no classifier: give it one with num_classes=...")
        return logits

    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        epochs: int,
        output_dir: str | Path | None = None,
        resume: bool = False,
        **options: Any,
    ) -> FitResult:
        """Trains the student with Hugging Face Accelerate, on whatever devices and processes there are.

        Args:
            train: A folder of class folders, a dataset of (image, label), tensors
                ``(images, labels)``, or a loader of such batches. With ``ce_weight=0`` also without
                labels: a folder, dataset, tensor or loader of images.
            val: The same, for `evaluate` after each epoch; ``None`` skips it.
            epochs: Passes over the training data.
            output_dir: Where checkpoints, history and the student go; ``None`` writes nothing.
            resume: Continue the run in ``output_dir`` from its newest whole checkpoint, if there is one.
            **options: Fields of `hetkd.training.TrainingOptions`: ``batch_size``, ``lr``, ``optimizer``,
                ``mixed_precision``, ``ema``, ``mixup``, ...

        Returns:
            History and best metrics. The student holds the weights of the last epoch (with
            ``ema``: their average); ``output_dir/best.safetensors`` those of the best.

        Raises:
            ValueError: If an option or the data are not valid.
            FileExistsError: If ``output_dir`` holds another run.
            hetkd.training.TrainingDiverged: If a loss term becomes NaN or Inf.
        """
        from hetkd.training.loop import fit

        self._looked_at_values = False
        for tap in self._teachers:
            if isinstance(tap, RecordedTap):
                options.setdefault("teacher_cache", tap.recorded.cache)
        return fit(self, train, val, epochs=epochs, output_dir=output_dir, resume=resume, options=options)

    def cache_teacher(
        self,
        train: Any,
        path: str | Path,
        *,
        views: int = 1,
        top_k: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        unreadable: str = "error",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Runs the teacher once over ``views`` augmented views of each training image, and keeps what it says.

        ``fit(train, teacher_cache=path)`` then trains from it without running the teacher: epoch e takes view
        e modulo ``views``. Augmentation is a pure function of (seed, view, image), so the student sees what the teacher
        saw. Stopped and called again, it goes on. It runs where `fit` would train: on the accelerator, if there is one.

        Args:
            train: As for `fit`, but no loader.
            path: A folder; the bytes it will take are printed first.
            views: Augmented views of each image.
            top_k: Logits kept an image; the other classes share what is left. ``None``: all.
            batch_size: Images a forward of the teacher.
            num_workers: Processes that load images.
            unreadable: As for `fit`.
            seed: Of the augmentation.
            progress: Print how far it is.

        Raises:
            ValueError: If ``path`` holds another cache, or the method uses no teacher.
            TypeError: If ``train`` is a loader.
        """
        from hetkd.training.data import as_single_images, make_dataset
        from hetkd.training.teacher_cache import write_cache

        if not self._teachers:
            raise ValueError(f"{self.method.title} uses no teacher, so there is nothing to cache.")
        whole_number("views", views)
        if top_k is not None:
            whole_number("top_k", top_k)
        size, spec = self.loading_size, self.student_inputs.spec
        skip = choice("unreadable", unreadable, ["error", "skip"]) == "skip"
        dataset = make_dataset(train, what="train", spec=spec, size=size, train=True, seed=seed, skip_unreadable=skip)
        if torch.accelerator.is_available():
            self.to(torch.accelerator.current_accelerator())
        write_cache(
            self,
            as_single_images(dataset, "train", seed),
            Path(path),
            views=views,
            top_k=top_k,
            batch_size=batch_size,
            num_workers=num_workers,
            report=print if progress else lambda line: None,
        )

    def evaluate(self, data: Any, *, batch_size: int = 128) -> dict[str, float]:
        """Evaluates the student.

        Args:
            data: As ``val`` of `fit`.
            batch_size: Of data that is not a loader.

        Returns:
            ``{"top1", "top5", "loss"}``: accuracies in percent (top 5, or as many classes as there
            are) and mean cross-entropy.
        """
        from hetkd.training.evaluate import evaluate

        return evaluate(self, data, batch_size=batch_size)

    def save_student(self, path: str | Path) -> None:
        """Saves the plain student, with its library's own keys: hetkd is not needed to load it.

        Args:
            path: ``FILE.safetensors``; for a Hugging Face student also a directory (``save_pretrained``).
        """
        save_model(self.student, path)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that the student wants no weight decay for (timm's convention)."""
        names: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names}

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        look = not self._looked_at_values
        check_images(images, self._student.spec.channels, look_at_values=look, normalized=self.normalized)
        if labels is not None:
            check_labels(labels, len(images), self._student.classes, look or labels.device.type == "cpu")
        self._looked_at_values = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        if fn(torch.zeros(())).dtype in (torch.float16, torch.bfloat16):
            # Methods compute in float32 whatever the student's dtype; a detour by half precision would round them.
            for part in (self.student, self.student_inputs):
                part._apply(fn, recurse)
            self.method.to(self._student.device)
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._student.device.type != "meta":
            for teacher in self._teachers:
                teacher.to(self._student.device)
        return self


def _make_method(
    method: str | Method | Sequence[str | Method],
    options: dict[str, Any],
    teachers: int,
    teacher_weights: Sequence[float] | None,
) -> Method:
    if isinstance(method, (list, tuple)):
        if options:
            raise TypeError(
                f"options {sorted(options)} belong in the method objects of the list: method=[SFKD(ce_weight=0), ...]."
            )
        method = Combined(method)
    made = make_method(method, options)  # type: ignore[arg-type]
    if teachers != 1:
        return MultiTeacher([copy.deepcopy(made) for _ in range(teachers)], teacher_weights)
    if teacher_weights is not None:
        raise ValueError(f"teacher_weights={tuple(teacher_weights)} is for a list of several teachers.")
    return made


def _teacher_taps(
    teachers: Sequence[str | nn.Module | RecordedTeacher | None],
    method: Method,
    size: Any,
    normalized: Normalization | None,
) -> list[Tap]:
    if teachers == [None] and not method.uses_teacher:
        return []
    if None in teachers:
        raise ValueError(f"teacher=None, but {type(method).__name__} needs one; only method='ce' does without.")
    sizes = list(size) if len(teachers) > 1 and isinstance(size, list) else [size] * len(teachers)
    if len(sizes) != len(teachers):
        raise ValueError(f"input_size has {len(sizes)} sizes for {len(teachers)} teachers.")
    taps: list[Tap] = []
    for number, teacher in enumerate(teachers):
        role = "teacher" if len(teachers) == 1 else f"teacher{number}"
        if isinstance(teacher, RecordedTeacher):
            taps.append(RecordedTap(role, teacher, sizes[number], normalized))
            continue
        model = load_model(teacher) if isinstance(teacher, str) else teacher
        if not isinstance(model, nn.Module):
            raise TypeError(f"teacher must be a string or an nn.Module, got {teacher!r}.")
        model.requires_grad_(False)
        taps.append(Tap(role, model.eval(), sizes[number], normalized))
    return taps


def _recorded(teacher: Any) -> list[Any]:
    """Returns what a cache knows of its teachers, in the place of its name; anything else as it is."""
    if not (isinstance(teacher, str) and teacher.startswith(_CACHE)):
        return [teacher]
    from hetkd.training.teacher_cache import TeacherCache

    return list(TeacherCache(teacher.removeprefix(_CACHE)).teachers)


def _pooled_pair(teacher: Tap, student: Tap) -> StagePair | None:
    """Returns the vectors before both classifiers; of a model without a classifier or pooling the last map."""
    ends = [tap.vector or (tap.listed[-1] if tap.listed else None) for tap in (teacher, student)]
    return None if ends[0] is None or ends[1] is None else StagePair(ends[0], ends[1])


def _joint_logits(features: Sequence[Features]) -> Tensor | None:
    """Returns the teacher's logits; of several those whose softmax is the mean of their probabilities."""
    logits = [of_teacher.logits for of_teacher in features if of_teacher.logits is not None]
    if len(logits) < len(features) or len({x.shape for x in logits}) > 1:
        return None
    return logits[0] if len(logits) == 1 else torch.stack([x.log_softmax(1) for x in logits]).logsumexp(0)


def _check_classes(teacher: Tap, student: Tap) -> None:
    if teacher.classes is None:
        raise ValueError(
            f"the {teacher.role} has no classifier, but the method compares logits: use a teacher with one, or a "
            "feature method with kd_weight=0."
        )
    if teacher.classes != student.classes:
        raise ValueError(
            f"the {teacher.role} has {teacher.classes} classes and the student {student.classes}, but the method "
            "compares logits: give both the same number of classes, or use a feature method with kd_weight=0."
        )


def _sizes(input_size: Size | Mapping[str, Any] | None) -> dict[str, Any]:
    if input_size is None:
        return {}
    if isinstance(input_size, Mapping):
        for role in input_size:
            if role not in ("teacher", "student"):
                raise unknown_name("key of input_size", role, ["teacher", "student"])
        return dict(input_size)
    return {"student": input_size}
