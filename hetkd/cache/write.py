"""Runs the teachers once over all views of all images, and keeps their targets."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hetkd.cache.fingerprints import fingerprints, image_of
from hetkd.cache.records import (
    BASES,
    INDEX,
    image_checksum,
    is_complete,
    is_logits,
    is_whole,
    kept_logits,
    read_index,
    record_dtype,
    shards,
)
from hetkd.data.images import TransformedImages
from hetkd.data.seeding import sample_seed
from hetkd.features.tap import Tap
from hetkd.methods.common.method import Method
from hetkd.methods.common.statistics import ChannelReduction
from hetkd.models.inputs import check_images
from hetkd.teachers import RecordedTeacher, Teachers
from hetkd.utils.checks import whole_number
from hetkd.utils.files import with_prefix, write_atomically, write_json

Report = Callable[[str], None]


def write_cache(
    teachers: Teachers,
    dataset: TransformedImages,
    path: Path,
    *,
    views: int,
    top_k: int | None,
    maps: bool,
    loading: Mapping[str, Any],
    batch_size: int,
    num_workers: int,
    report: Report,
) -> None:
    """Record `Teachers.encode` for all views of all images; see `hetkd.Distiller.cache_teacher`.

    Of several processes the first one does it, and the others wait.
    """
    whole_number("views", views)
    whole_number("top_k", 1 if top_k is None else top_k)
    if int(os.environ.get("RANK", "0")):
        while not is_complete(path):
            time.sleep(1)
        return
    features = None
    if maps or not teachers.method.compares_features:  # for any method that reads them
        teachers = Teachers([_with_last_stage(tap) for tap in teachers.taps], Method(ce_weight=0))
        features = [list(tap.names) for tap in teachers.taps]
    shapes = _target_shapes(teachers, dataset, batch_size)
    dtype = record_dtype(shapes, top_k)
    facts = {"views": views, "top_k": top_k, "shapes": shapes, "seed": dataset.seed}
    about: dict[str, Any] = {
        **facts,
        "features": features,
        "loading": loading,
        **fingerprints(teachers, dataset),
        "teachers": _records_of_teachers(teachers),
        "shards": {},
    }
    total = dtype.itemsize * len(dataset) * views
    report(
        f"{dtype.itemsize:,} bytes an image and view, {total / 1e9:.2f} GB for {len(dataset):,} images x {views} views"
    )
    path.mkdir(parents=True, exist_ok=True)
    goes_on = (path / INDEX).exists()
    if goes_on:
        about["shards"] = _shards_of_same_cache(path, about)
    _keep_bases(teachers.method, path / BASES, goes_on=goes_on)
    for name, view, indices in shards(len(dataset), views):
        if is_whole(path / name, about["shards"].get(name)):
            continue
        dataset.start_epoch(view)
        loader = DataLoader(Subset(dataset, list(indices)), batch_size=batch_size, num_workers=num_workers)
        seeds = [sample_seed(dataset.seed or 0, view, index) for index in indices]
        content = _fill(np.zeros(len(seeds), dtype), _records(teachers, loader, shapes, top_k), seeds)
        _write_shard(path / name, content)
        about["shards"][name] = hashlib.sha256(content).hexdigest()
        write_json(path / INDEX, about)
        report(f"view {view + 1}/{views}: {indices.stop:,}/{len(dataset):,} images")


def _with_last_stage(tap: Tap) -> Tap:
    """Return the tap with the last stage among its own, which some methods leave to the logits and others compare."""
    if not tap.names or tap.listed[-1].name in tap.names:
        return tap
    tap = copy.copy(tap)
    tap.select([*tap.names, tap.listed[-1].name])
    return tap


def _write_shard(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _shards_of_same_cache(path: Path, about: dict[str, Any]) -> dict[str, str]:
    before = read_index(path / INDEX)
    different = [name for name, value in about.items() if name != "shards" and before.get(name) != value]
    if different:
        raise ValueError(f"{path} holds another cache (other {', '.join(different)}): choose another path.")
    shards_before: dict[str, str] = before["shards"]
    return shards_before


def _keep_bases(method: Method, path: Path, *, goes_on: bool) -> None:
    """Save what `Method.encode` has fitted (a PCA) as caching begins, or load it as caching goes on."""
    modules = {name: x for name, x in method.named_modules() if isinstance(x, ChannelReduction) and x.is_fitted}
    if goes_on and modules:
        method.load_state_dict(load_file(path), strict=False)
    elif modules:
        bases = {
            key: x for name, part in modules.items() for key, x in with_prefix(f"{name}.", part.state_dict()).items()
        }
        write_atomically(path, lambda temporary: save_file(bases, temporary))


def _records_of_teachers(teachers: Teachers) -> list[dict[str, Any]]:
    recorded = [RecordedTeacher.of(*each) for each in zip(teachers.taps, teachers.fingerprints(), strict=True)]
    values: list[dict[str, Any]] = json.loads(json.dumps([teacher.to_json() for teacher in recorded]))
    return values


def _target_shapes(teachers: Teachers, dataset: TransformedImages, batch_size: int) -> dict[str, list[int]]:
    """Encode the first batch. `Method.encode` fits a PCA to it, the same whenever caching starts."""
    dataset.start_epoch(0)
    images = torch.stack([image_of(dataset[index]) for index in range(min(batch_size, len(dataset)))])
    inputs = teachers.taps[0].inputs
    check_images(images, inputs.spec.channels, look_at_values=True, normalized=inputs.takes_normalized)
    encoded = teachers.encode(images.to(teachers.taps[0].device))
    return {name: list(x.shape[1:]) for name, x in encoded.targets.items()}


def _records(
    teachers: Teachers, loader: DataLoader[Any], shapes: Mapping[str, list[int]], top_k: int | None
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        targets = teachers.encode(images.to(teachers.taps[0].device, non_blocking=True)).targets
        fields: dict[str, Tensor] = {"image": torch.tensor([image_checksum(image) for image in images])}
        for name in shapes:
            x = targets[name].float()
            if is_logits(name, shapes[name]):
                fields |= _compressed_logits(name, x, kept_logits(x.shape[1], top_k))
            else:
                scale = x.flatten(1).abs().amax(1).clamp_min(1e-30)
                fields[f"{name}.scale"] = scale
                fields[name] = x / scale.reshape(-1, *(1 for _ in x.shape[1:]))
        yield {name: x.cpu().numpy() for name, x in fields.items()}


def _compressed_logits(name: str, logits: Tensor, count: int) -> dict[str, Tensor]:
    # Relative to the largest, which changes no probability, logits keep the most bits in half precision.
    logits = logits - logits.amax(1, keepdim=True)
    top, ids = logits.topk(count, dim=1)
    classes = logits.shape[1]
    rest = torch.zeros(len(logits))
    if count < classes:
        others = logits.scatter(1, ids, -math.inf).logsumexp(1)
        rest = others - math.log(classes - count)
    return {f"{name}.top": top, f"{name}.ids": ids, f"{name}.rest": rest}


def _fill(content: np.ndarray[Any, Any], batches: Iterator[dict[str, np.ndarray[Any, Any]]], seeds: list[int]) -> bytes:
    content["seed"] = seeds
    start = 0
    for batch in batches:
        stop = start + len(next(iter(batch.values())))
        for name, values in batch.items():
            content[name][start:stop] = values
        start = stop
    return content.tobytes()
