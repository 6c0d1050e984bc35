"""Puts a report together: measures, draws, writes one HTML file without anything from the network."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from hetkd.data.samples import Keys
from hetkd.distillation import Distillation
from hetkd.report import figures
from hetkd.report.measure import (
    Answers,
    answers,
    band_energies,
    cka_table,
    compared_images,
    disagreements,
    pictures,
    report_images,
    stage_maps,
    untrained,
)
from hetkd.report.template import render
from hetkd.speed import Speed, speed_of
from hetkd.training.evaluate import in_role
from hetkd.utils.files import write_text

_CLASSES, _PAIRS, _PICTURES, _PIXELS = 24, 12, 24, 160


def write_report(
    distillation: Distillation,
    val: Any,
    path: Path,
    *,
    history: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
    baseline: Distillation | None,
    keys: Keys,
    most_images: int,
) -> Path:
    """Write a report; see `hetkd.Distiller.report`."""
    images = report_images(distillation, val, keys, most_images)
    sides = _sides(distillation, baseline)
    of_models = {name: answers(side, images, keys, most_images) for name, side in sides.items()}
    student = of_models["student"]
    names = _class_names(distillation, student)
    page = {
        "title": distillation.plan.title,
        "subtitle": f"{len(student.labels):,} validation images, {len(names):,} classes",
        **_glance(sides, of_models),
        "curves": figures.curves(history) if history else [],
        **_failures(names, of_models),
        "pictures": _disagreements(distillation, images, keys, most_images, names, of_models),
        "reliability": figures.reliability(of_models),
        **_features(distillation, images, keys),
        "plan": str(distillation.plan),
        "settings": [(name, value) for name, value in settings.items() if value not in (None, "", [], {})],
        "version": version("hetkd"),
        "date": date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render("page.html", page))
    return path


def _sides(distillation: Distillation, baseline: Distillation | None) -> dict[str, Distillation]:
    """Return all models that answer, the student first."""
    alone = {} if baseline is None else {"student alone": baseline}
    live = [tap for tap in distillation.teachers.live if not tap.yields_probabilities]
    taps = [tap for tap in live if tap.classes == distillation.classes]
    return {"student": distillation, **alone, **{tap.role: in_role(distillation, tap.role) for tap in taps}}


def _class_names(distillation: Distillation, student: Answers) -> list[str]:
    count = student.probabilities.shape[1]
    return distillation.class_names or [str(number) for number in range(count)]


def _glance(sides: Mapping[str, Distillation], of_models: Mapping[str, Answers]) -> dict[str, Any]:
    columns = (
        "input",
        "top-1, %",
        "top-5, %",
        "loss",
        "calibration error, %",
        "parameters",
        "GFLOP an image",
        "ms an image",
    )
    rows, speeds = [], {name: speed_of(side, 1) for name, side in sides.items()}
    for name, found in of_models.items():
        speed: Speed = speeds[name]
        accuracy = [f"{found.top1:.2f}", f"{found.top5:.2f}", f"{found.loss:.3f}", f"{found.calibration_error:.1f}"]
        cost = [f"{speed.parameters / 1e6:.2f} M", f"{speed.gigaflops:.3g}", f"{speed.milliseconds:.1f}"]
        rows.append([name, f"{speed.size[1]} x {speed.size[0]}", *accuracy, *cost])
    first = next(iter(speeds.values()))
    where = f"{first.threads} thread{'s' * (first.threads > 1)} of a CPU" if first.device == "cpu" else first.device
    return {"columns": columns, "models": rows, "glance": f"Times are of one image at a time, on {where}."}


def _failures(names: Sequence[str], of_models: Mapping[str, Answers]) -> dict[str, Any]:
    accuracies = {name: found.of_class(len(names)) for name, found in of_models.items()}
    seen = sum(value is not None for value in accuracies["student"])
    shown = f"The {_CLASSES} worst of {seen} classes." if seen > _CLASSES else "All classes, the worst first."
    return {
        "of_classes": figures.accuracy_of_classes(names, accuracies, _CLASSES),
        "of_classes_caption": shown,
        "confusions": figures.confusions(names, of_models["student"], _PAIRS),
    }


def _disagreements(
    distillation: Distillation,
    images: Any,
    keys: Keys,
    most: int,
    names: Sequence[str],
    of_models: Mapping[str, Answers],
) -> list[dict[str, str]]:
    teacher = next((found for name, found in of_models.items() if name.startswith("teacher")), None)
    if teacher is None:
        return []
    student = of_models["student"]
    chosen = disagreements(student, teacher, _PICTURES)

    def said(found: Answers, index: int) -> str:
        best = int(found.classes[index])
        return f"{names[best]}, {100 * float(found.probabilities[index, best]):.0f} %"

    shown = pictures(distillation, images, keys, most, chosen)
    return [
        {
            "data": _jpeg(picture),
            "label": names[int(student.labels[index])],
            "student": said(student, index),
            "teacher": said(teacher, index),
        }
        for index, picture in zip(chosen, shown, strict=True)
    ]


def _jpeg(picture: Tensor) -> str:
    from torchvision.transforms.functional import to_pil_image

    image = to_pil_image(picture).convert("RGB")
    image.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _features(distillation: Distillation, images: Any, keys: Keys) -> dict[str, Any]:
    """Compare the stages of student and first teacher, before and after the training, if both are here."""
    live = [tap for tap in distillation.teachers.live if tap.listed]
    if not live or not distillation.student_tap.listed:
        return {}
    seen = compared_images(distillation, images, keys)
    teacher, student = stage_maps(live[0], seen), stage_maps(distillation.student_tap, seen)
    before = untrained(distillation)
    parts = {"as trained": student} | ({} if before is None else {"untrained": stage_maps(before, seen)})
    tables = {when: cka_table(teacher, maps) for when, maps in parts.items()}
    bands = {"teacher": teacher, **{f"student {when}": maps for when, maps in parts.items()}}
    return {
        "compared": len(seen),
        "likeness": [figures.likeness(list(teacher), list(student), table, when) for when, table in tables.items()],
        "energies": figures.energies({name: band_energies(maps) for name, maps in bands.items()}),
    }
