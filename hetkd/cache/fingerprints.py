"""Fingerprints of models, method and data: a cache is refused where they differ."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetkd.cache.records import TeacherCache
from hetkd.data.images import TensorImages, TransformedImages
from hetkd.data.labels import known_labels
from hetkd.features.tap import Tap
from hetkd.teachers import Teachers

_CHECKED_SAMPLES = 16
_PIXEL_BYTES = 2**28
_WORDS = {
    "data": "data set or input transform",
    "inputs": "size or normalisation of the images that a teacher sees",
    "samples": "number of images",
}
_CURES = {"data": " (a student larger than the one that it was made with needs larger images)"}


def fingerprints(teachers: Teachers, dataset: TransformedImages) -> dict[str, Any]:
    """Return what the targets of a cache depend on: images, teachers, their input transforms, what is made of them."""
    return {
        "samples": len(dataset),
        "targets": teachers.method.describe_targets(),
        "teacher": teachers.fingerprints(),
        "inputs": input_transforms(teachers.taps),
        "data": fingerprint_data(dataset),
    }


def check_cache(cache: TeacherCache, teachers: Teachers, dataset: TransformedImages) -> None:
    """Refuse a cache that was made of other data, another transform or teacher, or that lacks a target.

    Raises:
        ValueError: If anything differs; the message says what.
    """
    needed = fingerprints(teachers, dataset)
    del needed["targets"]
    if cache.holds_features_for(teachers):
        for number, tap in enumerate(teachers.taps):
            for stage in tap.names:
                cache.map_of(number, stage)
    for name, value in needed.items():
        if cache.about.get(name) != value:
            cure = _CURES.get(name, "")
            raise ValueError(
                f"teacher_cache={str(cache.path)!r} was made with another {_WORDS.get(name, name)}"
                f"{_difference(cache.about.get(name), value)}{cure}."
            )
    wanted = {cache.logits_of(number) for number in range(len(teachers.taps))}
    if teachers.method.uses_teacher_logits and not wanted <= set(cache.about["shapes"]):
        raise ValueError(
            f"teacher_cache={str(cache.path)!r} was made with kd_weight=0 and holds no logits: use kd_weight=0, or "
            "make a cache with logits."
        )
    if not cache.holds_features_for(teachers):
        cache.names_of(teachers.method)


def fingerprint_data(dataset: TransformedImages | TensorImages) -> str:
    """Return a digest of some images, evenly spread, as they come out of the transform in the first epoch."""
    if isinstance(dataset, TransformedImages):
        dataset.start_epoch(0)
    digest = hashlib.sha256()
    for index in range(0, len(dataset), max(1, len(dataset) // _CHECKED_SAMPLES)):
        digest.update(image_of(dataset[index]).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def image_of(sample: Any) -> Tensor:
    """Return the image of a sample with or without a label."""
    image: Tensor = sample[0] if isinstance(sample, tuple) else sample
    return image


def fingerprint_content(dataset: TransformedImages | TensorImages) -> str:
    """Return a digest of all labels, as far as they are known, with the names of files or with pixels in memory."""
    digest, labels = hashlib.sha256(), known_labels(dataset)
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    if isinstance(dataset, TensorImages):
        step = max(1, dataset.images.nbytes // _PIXEL_BYTES)
        digest.update(dataset.images[::step].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update("\n".join(os.path.basename(dataset.name_of(n)) for n in range(len(dataset))).encode())
    return digest.hexdigest()


def input_transforms(taps: Sequence[Tap]) -> dict[str, Any]:
    """Return the input transform of each model."""
    inputs: dict[str, Any] = {}
    for tap in taps:
        inputs[f"{tap.role} size"] = list(tap.size)
        inputs[f"{tap.role} scale"] = tap.inputs.scale.flatten().tolist()
        inputs[f"{tap.role} shift"] = tap.inputs.shift.flatten().tolist()
        if tap.spec.reversed_channels:
            inputs[f"{tap.role} channels"] = "reversed"
    return inputs


def _difference(before: Any, now: Any) -> str:
    """Return the difference in words, where a person can use it."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        return f" ({', '.join(changed)})"
    return f" ({before}, now {now})" if isinstance(now, int) else ""
