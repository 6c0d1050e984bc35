"""What the teacher says of every training image, on disk: run it once over a few views, train from it many times."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hetkd.files import checksum, write_atomically, write_json
from hetkd.inputs import check_images
from hetkd.methods import Method
from hetkd.methods.matching import ChannelReduction
from hetkd.tap import RecordedTeacher
from hetkd.training.data import TensorImages, TransformedImages
from hetkd.training.packing import with_prefix
from hetkd.training.random_state import sample_seed

if TYPE_CHECKING:
    from hetkd.distiller import Distiller

INDEX, BASES = "index.json", "bases.safetensors"
SHARD_RECORDS = 16_384
_CHECKED_SAMPLES = 16


class TeacherCache:
    """A folder of cached targets: fixed-size records in memory-mapped shards, and an index that describes them.

    A record holds the seed of the image's augmentation, a checksum of the image as it was loaded, the ``top_k``
    largest logits in half precision (the others share what is left of the probability), and each further target of
    `hetkd.Method.encode` in half precision with a scale.

    Args:
        path: The folder.

    Raises:
        ValueError: If it holds no complete cache, or a shard is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if not index.exists():
            raise ValueError(f"teacher_cache={str(path)!r} holds no cache: make one by distiller.cache_teacher(...).")
        self.about = _read_index(index)
        missing = self._expected_shards() - set(self.about["shards"])
        if missing:
            raise ValueError(
                f"teacher_cache={str(path)!r} is not complete ({len(missing)} shards are missing): the same call of "
                "cache_teacher goes on."
            )
        self.dtype = record_dtype(self.about["shapes"], self.about["top_k"])
        self._shards: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves open files out, which processes that load data would get the content of."""
        return {**vars(self), "_shards": {}}

    def _expected_shards(self) -> set[str]:
        return {name for name, _, _ in shards(self.about["samples"], self.about["views"])}

    @property
    def teachers(self) -> list[RecordedTeacher]:
        """What is known of the teachers without their weights."""
        return [RecordedTeacher.from_json(str(self.path), values) for values in self.about["teachers"]]

    def verify(self) -> None:
        """Reads everything once and compares checksums.

        Raises:
            ValueError: If a shard is damaged.
        """
        for name, expected in self.about["shards"].items():
            if not _is_whole(self.path / name, expected):
                raise ValueError(
                    f"{self.path / name} is missing or damaged: the same call of cache_teacher repairs it."
                )

    def check(self, distiller: Distiller, dataset: TransformedImages) -> None:
        """Refuses a cache that was made of other data, another transform, teacher or method.

        Raises:
            ValueError: If anything differs; the message says what.
        """
        expected = {
            "samples": len(dataset),
            "method": _encoding(distiller.method),
            "stages": _stages(distiller),
            "teacher": fingerprint_teachers(distiller),
            "inputs": _inputs(distiller),
            "data": fingerprint_data(dataset),
        }
        for name, value in expected.items():
            if self.about.get(name) != value:
                raise ValueError(
                    f"teacher_cache={str(self.path)!r} was made with another {_WHAT.get(name, name)}"
                    f"{_difference(self.about.get(name), value)}."
                )
        if distiller.method.uses_teacher_logits and not any(_is_logits(name) for name in self.about["shapes"]):
            raise ValueError(
                f"teacher_cache={str(self.path)!r} was made with kd_weight=0 and holds no logits: use kd_weight=0, or "
                "make a cache with logits."
            )

    def record(self, view: int, index: int, image: Tensor) -> dict[str, Tensor]:
        """Returns the record of image ``index`` in ``view``, as tensors.

        Raises:
            ValueError: If it is the record of another image.
        """
        name = shard_name(view, index // SHARD_RECORDS)
        if name not in self._shards:
            self._shards[name] = np.memmap(self.path / name, dtype=self.dtype, mode="r")
        record = self._shards[name][index % SHARD_RECORDS]
        if int(record["seed"]) != sample_seed(self.about["seed"], view, index):
            raise ValueError(f"{self.path / name} is damaged: image {index} has the record of another one.")
        if int(record["image"]) != image_checksum(image):
            raise ValueError(
                f"teacher_cache={str(self.path)!r} was made of other data: image {index} is not what the teacher saw."
            )
        fields = {field: np.array(record[field]) for field in self.dtype.names or () if field not in ("seed", "image")}
        return {
            field: torch.from_numpy(x.astype(np.int32) if x.dtype == np.uint16 else x) for field, x in fields.items()
        }

    def targets(self, records: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turns a batch of records back into the targets that `hetkd.Method.forward` takes, in float32."""
        targets: dict[str, Tensor] = {}
        for name in self.about["shapes"]:
            if _is_logits(name):
                targets[name] = self._logits(records, name)
            else:
                scale = records[f"{name}.scale"]
                targets[name] = records[name].float() * scale.reshape(-1, *(1 for _ in records[name].shape[1:]))
        return targets

    def _logits(self, records: Mapping[str, Tensor], name: str) -> Tensor:
        top, ids, rest = (records[f"{name}.{part}"] for part in ("top", "ids", "rest"))
        logits = rest.float().unsqueeze(1).repeat(1, self.about["shapes"][name][0])
        return logits.scatter(1, ids.long(), top.float())


_WHAT = {
    "stages": "choice or size of stages",
    "data": "data set or input transform",
    "teacher": "teacher",
    "inputs": "size or normalisation of the images that a teacher sees",
    "samples": "number of images",
}


def _difference(before: Any, now: Any) -> str:
    """Returns what differs, where a person can make something of it."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        return f" ({', '.join(changed)})"
    return f" ({before}, now {now})" if isinstance(now, int) or _has_names(now) else ""


def _has_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


class CachedImages(TransformedImages):
    """A training set whose samples come with the teacher's records: (image, label, record); -1 stands for no label.

    Args:
        images: The training set; its epochs take the cached views in a circle.
        cache: Made of these images.
    """

    def __init__(self, images: TransformedImages, cache: TeacherCache) -> None:
        super().__init__(images.dataset, images.transform, images.seed, skip_unreadable=images.skip_unreadable)
        self.cache = cache

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        image, label = sample if isinstance(sample, tuple) else (sample, -1)
        return image, label, self.cache.record(self.epoch, index, image)

    def start_epoch(self, epoch: int) -> None:
        """Takes the view of this epoch; see `TransformedImages.start_epoch`."""
        super().start_epoch(epoch % self.cache.about["views"])


def write_cache(
    distiller: Distiller,
    dataset: TransformedImages,
    path: Path,
    *,
    views: int,
    top_k: int | None,
    batch_size: int,
    num_workers: int,
    report: Callable[[str], None],
) -> None:
    """Runs the teacher over all views of all images; see `hetkd.Distiller.cache_teacher`."""
    shapes = _target_shapes(distiller, dataset, batch_size)
    dtype = record_dtype(shapes, top_k)
    about: dict[str, Any] = {
        "views": views,
        "top_k": top_k,
        "shapes": shapes,
        "seed": dataset.seed,
        "samples": len(dataset),
        "method": _encoding(distiller.method),
        "stages": _stages(distiller),
        "teacher": fingerprint_teachers(distiller),
        "teachers": _recorded_teachers(distiller),
        "inputs": _inputs(distiller),
        "data": fingerprint_data(dataset),
        "shards": {},
    }
    total = dtype.itemsize * len(dataset) * views
    report(
        f"{dtype.itemsize:,} bytes an image and view, {total / 1e9:.2f} GB for {len(dataset):,} images x {views} views"
    )
    path.mkdir(parents=True, exist_ok=True)
    if (path / INDEX).exists():
        before = _read_index(path / INDEX)
        different = [name for name, value in about.items() if name != "shards" and before.get(name) != value]
        if different:
            raise ValueError(f"{path} holds another cache (other {', '.join(different)}): choose another path.")
        about["shards"] = before["shards"]
    _keep_bases(distiller.method, path / BASES, goes_on=(path / INDEX).exists())
    for name, view, indices in shards(len(dataset), views):
        if _is_whole(path / name, about["shards"].get(name)):
            continue
        dataset.start_epoch(view)
        loader = DataLoader(Subset(dataset, list(indices)), batch_size=batch_size, num_workers=num_workers)
        records = _records(distiller, loader, dtype, shapes, top_k)
        seeds = [sample_seed(dataset.seed or 0, view, index) for index in indices]
        content = _fill(np.zeros(len(seeds), dtype), records, seeds)
        write_atomically(path / name, lambda temporary, content=content: temporary.write_bytes(content))  # type: ignore[misc]
        about["shards"][name] = hashlib.sha256(content).hexdigest()
        write_json(path / INDEX, about)
        report(f"view {view + 1}/{views}: {indices.stop:,}/{len(dataset):,} images")


def image_checksum(image: Tensor) -> int:
    """Returns a checksum of an image as it was loaded."""
    return zlib.crc32(image.cpu().contiguous().numpy().tobytes())


def shards(samples: int, views: int) -> Iterator[tuple[str, int, range]]:
    """Yields name, view and image indices of every shard."""
    for view in range(views):
        for number, start in enumerate(range(0, samples, SHARD_RECORDS)):
            yield shard_name(view, number), view, range(start, min(samples, start + SHARD_RECORDS))


def shard_name(view: int, number: int) -> str:
    """Returns the file name of a shard."""
    return f"view{view:03d}-{number:05d}.bin"


def _is_whole(path: Path, expected: str | None) -> bool:
    return path.exists() and checksum(path) == expected


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and call cache_teacher again.") from error
    return index


def record_dtype(shapes: Mapping[str, list[int]], top_k: int | None) -> np.dtype[Any]:
    """Returns the layout of a record for targets of these shapes (without the batch)."""
    fields: list[tuple[Any, ...]] = [("seed", "<u8"), ("image", "<u4")]
    for name, shape in shapes.items():
        if _is_logits(name):
            count = _kept(shape[0], top_k)
            fields += [(f"{name}.top", "<f2", (count,)), (f"{name}.ids", "<u2", (count,)), (f"{name}.rest", "<f4")]
        else:
            fields += [(name, "<f2", tuple(shape)), (f"{name}.scale", "<f4")]
    return np.dtype(fields)


def fingerprint_model(model: nn.Module) -> str:
    """Returns a digest of all weights and buffers."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_teachers(distiller: Distiller) -> list[str]:
    """Returns the digest of each teacher."""
    teachers = [tap for role, tap in distiller.taps.items() if role != "student"]
    return [tap.fingerprint or fingerprint_model(tap.model) for tap in teachers]


def _inputs(distiller: Distiller) -> dict[str, Any]:
    """Returns what becomes of images before each teacher sees them."""
    inputs: dict[str, Any] = {}
    for role, tap in distiller.taps.items():
        if role != "student":
            inputs[f"{role} size"] = list(tap.size)
            inputs[f"{role} scale"] = tap.inputs.scale.flatten().tolist()
            inputs[f"{role} shift"] = tap.inputs.shift.flatten().tolist()
            if tap.spec.reversed_channels:
                inputs[f"{role} channels"] = "reversed"
    return inputs


def _keep_bases(method: Method, path: Path, *, goes_on: bool) -> None:
    """Writes down what `Method.encode` has fitted (a PCA) as caching begins, or takes it from there as it goes on."""
    modules = {name: x for name, x in method.named_modules() if isinstance(x, ChannelReduction) and x.is_fitted}
    if goes_on and modules:
        method.load_state_dict(load_file(path), strict=False)
    elif modules:
        bases = {
            key: x for name, part in modules.items() for key, x in with_prefix(f"{name}.", part.state_dict()).items()
        }
        write_atomically(path, lambda temporary: save_file(bases, temporary))


def _recorded_teachers(distiller: Distiller) -> list[dict[str, Any]]:
    teachers = [tap for role, tap in distiller.taps.items() if role != "student"]
    recorded = [
        RecordedTeacher("", tap.title, digest, tap.spec, tap.size, tap.classes, tap.pooled, tuple(tap.stages))
        for tap, digest in zip(teachers, fingerprint_teachers(distiller), strict=True)
    ]
    values: list[dict[str, Any]] = json.loads(json.dumps([teacher.to_json() for teacher in recorded]))
    return values


def fingerprint_data(dataset: TransformedImages | TensorImages) -> str:
    """Returns a digest of some images, evenly spread, as they come out of the transform in the first epoch."""
    if isinstance(dataset, TransformedImages):
        dataset.start_epoch(0)
    digest = hashlib.sha256()
    for index in range(0, len(dataset), max(1, len(dataset) // _CHECKED_SAMPLES)):
        digest.update(_image(dataset[index]).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _image(sample: Any) -> Tensor:
    image: Tensor = sample[0] if isinstance(sample, tuple) else sample
    return image


def _is_logits(name: str) -> bool:
    return name == "logits" or name.endswith(".logits")


def _kept(classes: int, top_k: int | None) -> int:
    return classes if top_k is None else min(classes, top_k)


def _stages(distiller: Distiller) -> list[list[str]]:
    return [[str(pair.teacher), str(pair.student)] for pair in distiller.method.pairs or ()]


def _encoding(method: Method) -> dict[str, Any]:
    """Returns the options of a method as JSON values, without the weights of its terms, which change no target."""
    settings = json.loads(json.dumps(method.settings()))
    parts = [_encoding(part) for part in getattr(method, "methods", [])]
    options = {
        name: value
        for name, value in settings.items()
        if name not in ("temperature", "weights", "parts") and not name.endswith(("_weight", "_weights"))
    }
    return {**options, "parts": parts} if parts else options


@torch.no_grad()
def _encoded(distiller: Distiller, images: Tensor) -> dict[str, Tensor]:
    teachers = [tap for role, tap in distiller.taps.items() if role != "student"]
    return distiller.method.encode(*(tap.run(images) for tap in teachers))


def _target_shapes(distiller: Distiller, dataset: TransformedImages, batch_size: int) -> dict[str, list[int]]:
    """Encodes the first batch, to which what `Method.encode` fits (a PCA) is fitted too, whenever caching starts."""
    dataset.start_epoch(0)
    images = torch.stack([_image(dataset[index]) for index in range(min(batch_size, len(dataset)))])
    check_images(images, distiller.student_inputs.spec.channels, look_at_values=True, normalized=distiller.normalized)
    encoded = _encoded(distiller, images.to(_device(distiller)))
    return {name: list(x.shape[1:]) for name, x in encoded.items()}


def _device(distiller: Distiller) -> torch.device:
    return distiller.taps["student"].device


def _records(
    distiller: Distiller,
    loader: DataLoader[Any],
    dtype: np.dtype[Any],
    shapes: Mapping[str, list[int]],
    top_k: int | None,
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        encoded = _encoded(distiller, images.to(_device(distiller), non_blocking=True))
        fields: dict[str, Tensor] = {"image": torch.tensor([image_checksum(image) for image in images])}
        for name in shapes:
            x = encoded[name].float()
            if _is_logits(name):
                fields |= _compressed_logits(name, x, _kept(x.shape[1], top_k))
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
