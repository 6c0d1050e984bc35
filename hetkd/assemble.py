"""From strings, modules, sizes and stages to the parts of a distillation."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hetkd.cache.records import TeacherCache
from hetkd.features.adapter import StagePair
from hetkd.features.pairing import POOLED, StageChoice, chosen_names, chosen_pairs, pair_stages
from hetkd.features.tap import Size, Tap, refuse_frozen_graphs
from hetkd.methods.common.combined import Combined
from hetkd.methods.common.method import Method, list_methods, make_method
from hetkd.methods.common.stagewise import count_parameters
from hetkd.models.hugging_face import copy_label_names
from hetkd.models.inputs import Normalization
from hetkd.models.load import is_file, load_model
from hetkd.models.wrappers import tapped_module, trained_memory, unwrap
from hetkd.plan import Plan, PlanRow
from hetkd.tasks import Task, is_dense_task, make_task
from hetkd.teachers import MultiTeacher, RecordedTap, RecordedTeachers, Teachers, parts_of
from hetkd.utils.checks import unknown_name

_CACHE = "cache:"
_EACH = {True: "each pixel", False: "the whole image"}


@dataclass(frozen=True)
class Parts:
    """The parts of a distillation.

    Attributes:
        student: The plain student module.
        student_tap: How it is run.
        method: Bound to the stage pairs.
        teachers: Live or recorded; empty for a method without a teacher.
        plan: What is matched with what.
        classes_from_data: Whether nothing but the data says how many classes the student has.
    """

    student: nn.Module
    student_tap: Tap
    method: Method
    teachers: Teachers
    plan: Plan
    classes_from_data: bool


def assemble(
    teacher: Any,
    student: str | nn.Module,
    method: str | Method | Sequence[str | Method],
    *,
    num_classes: int | None,
    stages: Sequence[StageChoice] | None,
    teacher_weights: Sequence[float] | None,
    input_size: Size | Mapping[str, Any] | None,
    normalized: Normalization | None,
    teacher_classes: int | None,
    task: str | Task | None,
    method_options: dict[str, Any],
) -> Parts:
    """Build and check the parts of a distillation; arguments and errors as of `hetkd.Distiller`."""
    given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    recorded = _recorded_taps(teacher, input_size, normalized)
    count = len(given) if recorded is None else len(recorded)
    if not count:
        raise ValueError("teacher=[] is an empty list: give one teacher or several.")
    made = _make_method(method, method_options, count, teacher_weights)
    sizes, is_dense = _sizes(input_size), is_dense_task(task)
    taps = recorded
    if taps is None:
        taps = _live_taps(given, made, sizes.get("teacher"), normalized, teacher_classes, is_dense)
    built_here = isinstance(student, str) and num_classes is None and not is_file(student)
    if isinstance(student, str):
        classes = taps[0].classes if num_classes is None and taps and not is_file(student) else num_classes
        student = load_model(student, pretrained=False, num_classes=classes, **_dense_student(student, taps, is_dense))
        if taps:
            copy_label_names(taps[0].model, student)
    elif num_classes is not None:
        raise ValueError("num_classes is for a student given as a string; a module keeps the classes it has.")
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a string or an nn.Module, got {student!r}.")
    _refuse_shared_modules(student, taps)
    for tap in taps:
        tap.model.requires_grad_(False)
    if not made.uses_teacher:
        taps = []
    refuse_frozen_graphs("student", student)
    if is_dense is None and made.uses_teacher_logits and any(tap.classes and not tap.is_dense for tap in taps):
        is_dense = False  # a map that the student yields is a feature, then
    student_tap = Tap("student", student, sizes.get("student"), normalized, is_dense=is_dense)
    _refuse_without_logits(student_tap, made, is_dense)
    made.task = make_task(task, is_dense=student_tap.is_dense)
    _check_task(made, taps)
    _bind(made, taps, student_tap, stages)
    teachers = (Teachers if recorded is None or not taps else RecordedTeachers)(taps, made)
    plan, from_data = _make_plan(made, taps, student_tap), built_here and not made.uses_teacher_logits
    return Parts(unwrap(student), student_tap, made, teachers, plan, from_data)


def _dense_student(name: str, teachers: Sequence[Tap], is_dense: bool | None) -> dict[str, Any]:
    """Return what a student's name is built with: a timm encoder becomes a segmenter where the teacher is one."""
    wanted = any(tap.is_dense for tap in teachers) if is_dense is None else is_dense
    return {"task": "segmentation"} if wanted and not is_file(name) else {}


def _refuse_without_logits(student: Tap, method: Method, is_dense: bool | None) -> None:
    if not (method.uses_student_logits or method.uses_teacher_logits):
        return
    _refuse_probabilities(student)
    if student.classes is not None:
        return
    if is_dense is False:
        raise ValueError(
            "the student has no classifier that yields logits [B, classes], as task='classification' or a teacher of "
            "whole images needs: give it one with num_classes=..."
        )
    raise ValueError(
        "the student has no classifier: give it one with num_classes=... If it is a segmenter, it must return the "
        "logits [B, classes, h, w] of its last convolution, before any softmax and in no tuple; of logits that are "
        "made otherwise say task='segmentation'."
    )


def _check_task(method: Method, teachers: Sequence[Tap]) -> None:
    parts = [part for part in method.modules() if isinstance(part, Method)]
    for part in parts:
        if method.task.name not in part.tasks:
            raise ValueError(
                f"method {part.title} is for {' and '.join(part.tasks)}, not for {method.task.name}: use one of "
                f"{', '.join(list_methods(method.task.name))}."
            )
        part.task = method.task
    for tap in teachers if method.uses_teacher_logits else []:
        if tap.is_dense != method.task.is_dense and tap.classes is not None:
            raise ValueError(
                f"the {tap.role} yields logits for {_EACH[tap.is_dense]}, the student for {_EACH[not tap.is_dense]}, "
                "but the method compares logits: use a feature method with kd_weight=0."
            )


def _refuse_shared_modules(student: nn.Module, teachers: Sequence[Tap]) -> None:
    own = trained_memory(student)
    for tap in teachers:
        if tapped_module(student) is tap.model:
            raise ValueError("teacher and student are the same module; pass a copy.deepcopy as the student.")
        theirs = trained_memory(tap.model)
        shared = [name for where, name in own.items() if where in theirs]
        if shared:
            raise ValueError(
                f"the {tap.role} and the student share parameters or statistics ({', '.join(shared[:3])}), which would "
                "be frozen, or trained in both: pass a copy.deepcopy as the student."
            )


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


def _sizes(input_size: Size | Mapping[str, Any] | None) -> dict[str, Any]:
    if input_size is None:
        return {}
    if isinstance(input_size, Mapping):
        for role in input_size:
            if role not in ("teacher", "student"):
                raise unknown_name("key of input_size", role, ["teacher", "student"])
        return dict(input_size)
    return {"student": input_size}


def _each_size(size: Any, count: int) -> list[Any]:
    sizes = list(size) if count > 1 and isinstance(size, list) else [size] * count
    if len(sizes) != count:
        raise ValueError(f"input_size has {len(sizes)} sizes for {count} teachers.")
    return sizes


def _roles(count: int) -> list[str]:
    return ["teacher"] if count == 1 else [f"teacher{number}" for number in range(count)]


def _recorded_taps(teacher: Any, input_size: Any, normalized: Normalization | None) -> list[Tap] | None:
    """Return taps for ``"cache:FOLDER"``, from the cache's records of its teachers; ``None`` for anything else."""
    if not (isinstance(teacher, str) and teacher.startswith(_CACHE)):
        return None
    recorded = TeacherCache(teacher.removeprefix(_CACHE)).teachers
    sizes = _each_size(_sizes(input_size).get("teacher"), len(recorded))
    return [
        RecordedTap(role, each, size, normalized)
        for role, each, size in zip(_roles(len(recorded)), recorded, sizes, strict=True)
    ]


def _live_taps(
    teachers: Sequence[Any],
    method: Method,
    size: Any,
    normalized: Normalization | None,
    classes: int | None,
    is_dense: bool | None,
) -> list[Tap]:
    if teachers == [None] and not method.uses_teacher:
        return []
    if None in teachers:
        raise ValueError(f"teacher=None, but {type(method).__name__} needs one; only method='ce' does without.")
    taps: list[Tap] = []
    sizes = _each_size(size, len(teachers))
    for role, teacher, own_size in zip(_roles(len(teachers)), teachers, sizes, strict=True):
        model = load_model(teacher) if isinstance(teacher, str) else teacher
        if not isinstance(model, nn.Module):
            raise TypeError(f"teacher must be a string or an nn.Module, got {teacher!r}.")
        refuse_frozen_graphs(role, model)
        taps.append(Tap(role, model.eval(), own_size, normalized, classes, is_dense=is_dense))
    return taps


def _bind(method: Method, teachers: Sequence[Tap], student: Tap, stages: Sequence[StageChoice] | None) -> None:
    """Choose the stage pairs, make the method's parameters for them, and tap both sides there."""
    if student.classes == 1 and method.uses_student_logits:
        raise ValueError(
            "the student has one logit, whose softmax is always 1, so that no loss on it teaches anything: give it two "
            "classes (num_classes=2, labels 0 and 1), or a feature method with ce_weight=0 and kd_weight=0."
        )
    student.add_stages(chosen_names(stages, 1))
    method.classes = student.classes
    parts = list(parts_of(method, len(teachers)))
    pairs: list[StagePair] = []
    for number, (teacher, part) in enumerate(zip(teachers, parts, strict=True)):
        pairs += [replace(pair, source=number) for pair in _pairs_with(teacher, student, part, stages)]
    method.bind(pairs)
    student.select([pair.student.name for pair in method.pairs or ()])
    for teacher, part in zip(teachers, parts, strict=True):
        teacher.select(part.teacher_stages())


def _pairs_with(teacher: Tap, student: Tap, method: Method, stages: Sequence[StageChoice] | None) -> list[StagePair]:
    """Return the stage pairs of one teacher."""
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
    automatic = pair_stages(teacher.listed, student.listed)
    pairs = method.automatic_pairs(automatic, _pooled_pair(teacher, student))
    if not pairs:
        reason = teacher.why_no_stages or student.why_no_stages or "no stages fit each other"
        raise ValueError(f"{reason}, but {type(method).__name__} compares feature maps: use method='kd'.")
    return pairs


def _pooled_pair(teacher: Tap, student: Tap) -> StagePair | None:
    """Return the vectors before both classifiers; of a model without a classifier or pooling the last map."""
    ends = [tap.vector or (tap.listed[-1] if tap.listed else None) for tap in (teacher, student)]
    return None if ends[0] is None or ends[1] is None else StagePair(ends[0], ends[1])


def _check_classes(teacher: Tap, student: Tap) -> None:
    if teacher.classes is None:
        raise ValueError(
            f"the {teacher.role} has no classifier, but the method compares logits: use a teacher with one, or a "
            "feature method with kd_weight=0. (If its output are logits all the same, say so: teacher_classes=...)"
        )
    _refuse_probabilities(teacher)
    if getattr(getattr(teacher.model, "config", None), "problem_type", None) == "multi_label_classification":
        raise ValueError(
            f"the {teacher.role} says yes or no for each of its classes (multi-label), but the method compares softmax "
            "probabilities: use a feature method with kd_weight=0."
        )
    if teacher.classes != student.classes:
        raise ValueError(
            f"the {teacher.role} has {teacher.classes} classes and the student {student.classes}, but the method "
            "compares logits: give both the same number of classes, or use a feature method with kd_weight=0."
        )


def _refuse_probabilities(tap: Tap) -> None:
    if tap.yields_probabilities:
        raise ValueError(
            f"the {tap.role} yields probabilities, all between 0 and 1, but losses take logits: leave its softmax or "
            "sigmoid out, or undo it: model(images).log() after a softmax, .logit() after a sigmoid."
        )


def _make_plan(method: Method, teachers: Sequence[Tap], student: Tap) -> Plan:
    rows = [_row(method, index, pair, teachers, student) for index, pair in enumerate(method.pairs or ())]
    words = method.describe_logits()
    for teacher in teachers if words else []:
        name = "" if len(teachers) == 1 else teacher.role
        rows.append(PlanRow("logits", name, (teacher.classes or 0,), "", (student.classes or 0,), words, 0))
    taught_by = " + ".join(teacher.title for teacher in teachers) or "no teacher"
    title = f"{taught_by} -> {student.title}, method {method.title}"
    inputs = tuple(_input_line(tap) for tap in (*teachers, student))
    return Plan(title, tuple(rows), count_parameters(method), method.remark(), inputs)


def _input_line(tap: Tap) -> str:
    mean, std = (" ".join(f"{x:.3f}" for x in values) for values in (tap.spec.mean, tap.spec.std))
    return f"{tap.role}: {tap.size[0]} x {tap.size[1]} pixels, mean {mean}, std {std} ({tap.spec.source})"


def _row(method: Method, index: int, pair: StagePair, teachers: Sequence[Tap], student: Tap) -> PlanRow:
    teacher = teachers[pair.source]
    automatic = [replace(each, source=pair.source) for each in pair_stages(teacher.listed, student.listed)]
    row = str(automatic.index(pair)) if pair in automatic else "own"
    name = pair.teacher.name if len(teachers) == 1 else f"{teacher.role}: {pair.teacher.name}"
    shape: tuple[int, ...] = (pair.teacher.channels, *pair.teacher.grid)
    if pair.teacher.name not in teacher.names:  # the method learns from logits here
        name, shape = "logits", (teacher.classes or 0,)
    return PlanRow(
        "pooled" if POOLED in (pair.teacher.name, pair.student.name) else row,
        name,
        shape,
        pair.student.name,
        (pair.student.channels, *pair.student.grid),
        method.describe_pair(index),
        method.added_parameters(index),
    )
