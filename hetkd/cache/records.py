"""The records of a teacher cache: the teachers' targets for every training image and view, on disk."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetkd.data.seeding import sample_seed
from hetkd.features.adapter import Features
from hetkd.methods.common.combined import target_name
from hetkd.methods.common.method import Method
from hetkd.models.inputs import InputSpec
from hetkd.teachers import RecordedTeacher, Teachers
from hetkd.utils.files import checksum

INDEX, BASES = "index.json", "bases.safetensors"

SHARD_RECORDS = 16_384


class TeacherCache:
    """A folder of cached targets: fixed-size records in memory-mapped shards, and an index that describes them.

    A record holds the seed of the image's augmentation, a checksum of the loaded image, the ``top_k`` largest logits in
    half precision (the others share the rest of the probability), and each other target of `hetkd.Method.encode` in
    half precision with a scale.

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
        self.about = read_index(index)
        missing = self._expected_shards() - set(self.about["shards"])
        if missing:
            raise ValueError(
                f"teacher_cache={str(path)!r} is not complete ({len(missing)} shards are missing): the same call of "
                "cache_teacher goes on."
            )
        self.dtype = record_dtype(self.about["shapes"], self.about["top_k"])
        self._shards: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out: a loading process would get a copy of their content."""
        return {**vars(self), "_shards": {}}

    def _expected_shards(self) -> set[str]:
        return {name for name, _, _ in shards(self.about["samples"], self.about["views"])}

    @property
    def teachers(self) -> list[RecordedTeacher]:
        """The cached teachers, without their weights."""
        return [RecordedTeacher.from_json(str(self.path), values) for values in self.about["teachers"]]

    def loading(self, size: tuple[int, int], spec: InputSpec) -> tuple[tuple[int, int], InputSpec]:
        """Return how images are loaded to be those of the cache: as then, if that is large enough for the models now.

        Args:
            size: Height and width that the models want now.
            spec: The student's settings now.
        """
        then = self.about.get("loading")
        if then is None or then["size"][0] < size[0] or then["size"][1] < size[1]:
            return size, spec
        return (then["size"][0], then["size"][1]), replace(spec, interpolation=then["interpolation"])

    def verify(self) -> None:
        """Read everything once and compare checksums.

        Raises:
            ValueError: If a shard is damaged.
        """
        for name, expected in self.about["shards"].items():
            if not is_whole(self.path / name, expected):
                raise ValueError(
                    f"{self.path / name} is missing or damaged: the same call of cache_teacher repairs it."
                )

    def record(self, view: int, index: int, image: Tensor) -> dict[str, Tensor]:
        """Return the record of image ``index`` in ``view``, as tensors.

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
            field: torch.from_numpy(x.astype(np.int64) if x.dtype == np.uint32 else x.astype(np.int32))
            if field.endswith(".ids")
            else torch.from_numpy(x)
            for field, x in fields.items()
        }

    def holds_features_for(self, teachers: Teachers) -> bool:
        """Say whether the records are the teachers' own features, which their method encodes anew."""
        return bool(self.about.get("features")) or not teachers.method.compares_features

    def targets(self, records: Mapping[str, Tensor], teachers: Teachers) -> dict[str, Tensor]:
        """Turn a batch of records into targets for `hetkd.Method.forward`, in float32."""
        found = self.recorded(records)
        if not self.holds_features_for(teachers):
            return {name: found[cached] for name, cached in self.names_of(teachers.method).items()}
        features = [
            Features(found.get(self.logits_of(number)), tuple(found[self.map_of(number, name)] for name in tap.names))
            for number, tap in enumerate(teachers.taps)
        ]
        return teachers.encode_features(features).targets

    def names_of(self, method: Method) -> dict[str, str]:
        """Return under which name each target of a method is recorded, whatever method it was recorded for.

        Raises:
            ValueError: If one is not recorded; the message says what differs.
        """
        kept: dict[str, dict[str, Any]] = self.about.get("targets", {})
        names = {}
        for name, wanted in method.describe_targets().items():
            found = [other for other, x in kept.items() if x == json.loads(json.dumps(wanted))]
            if not found:
                raise ValueError(
                    f"teacher_cache={str(self.path)!r} {_lack(wanted, list(kept.values()))}: "
                    "cache_teacher(..., maps=True) makes one for all methods and students."
                )
            names[name] = found[0]
        return names

    def logits_of(self, teacher: int) -> str:
        """Return the name of the logits of a teacher in `recorded`."""
        return self._name(teacher, "logits")

    def map_of(self, teacher: int, stage: str) -> str:
        """Return the name of a teacher's map in `recorded`.

        Raises:
            ValueError: If it is not recorded.
        """
        stages: list[str] = self.about["features"][teacher] if self.about.get("features") else []
        if stage not in stages:
            raise ValueError(
                f"teacher_cache={str(self.path)!r} holds no map of {stage} (it has {', '.join(stages) or 'no maps'}): "
                "choose other stages, or make a cache with it: distiller.cache_teacher(..., maps=True)."
            )
        return self._name(teacher, f"stage{stages.index(stage)}")

    def _name(self, teacher: int, name: str) -> str:
        return name if len(self.about["teachers"]) == 1 else target_name(teacher, name)

    def recorded(self, records: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a batch of records holds, by name, in float32."""
        targets: dict[str, Tensor] = {}
        for name in self.about["shapes"]:
            if is_logits(name, self.about["shapes"][name]):
                targets[name] = self._logits(records, name)
            else:
                scale = records[f"{name}.scale"]
                targets[name] = records[name].float() * scale.reshape(-1, *(1 for _ in records[name].shape[1:]))
        return targets

    def _logits(self, records: Mapping[str, Tensor], name: str) -> Tensor:
        top, ids, rest = (records[f"{name}.{part}"] for part in ("top", "ids", "rest"))
        logits = rest.float().unsqueeze(1).repeat(1, self.about["shapes"][name][0])
        return logits.scatter(1, ids.long(), top.float())


def _lack(wanted: dict[str, Any], kept: list[dict[str, Any]]) -> str:
    """Say what a cache has instead of a target."""
    stage = wanted.get("stage", "the logits")
    alike = [x for x in kept if x.get("stage") == wanted.get("stage") and x["teacher"] == wanted["teacher"]]
    if not alike:
        others = ", ".join(dict.fromkeys(str(x["stage"]) for x in kept if "stage" in x)) or "no stage"
        return f"holds nothing of stage {stage} (it has {others})"
    other = alike[0]
    differences = [f"{k} {other.get(k)!r} instead of {v!r}" for k, v in wanted.items() if other.get(k) != v]
    return f"holds stage {stage} with {', '.join(differences)}"


def is_complete(path: Path) -> bool:
    """Say whether a folder holds a complete cache."""
    if not (path / INDEX).exists():
        return False
    about = read_index(path / INDEX)
    return {name for name, _, _ in shards(about["samples"], about["views"])} <= set(about["shards"])


def image_checksum(image: Tensor) -> int:
    """Return a checksum of an image as it was loaded."""
    return zlib.crc32(image.cpu().contiguous().numpy().tobytes())


def shards(samples: int, views: int) -> Iterator[tuple[str, int, range]]:
    """Yield name, view and image indices of every shard."""
    for view in range(views):
        for number, start in enumerate(range(0, samples, SHARD_RECORDS)):
            yield shard_name(view, number), view, range(start, min(samples, start + SHARD_RECORDS))


def shard_name(view: int, number: int) -> str:
    """Return the file name of a shard."""
    return f"view{view:03d}-{number:05d}.bin"


def is_whole(path: Path, expected: str | None) -> bool:
    """Say whether a shard is there with the expected checksum."""
    return path.exists() and checksum(path) == expected


def read_index(path: Path) -> dict[str, Any]:
    """Read the description of a cache.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and call cache_teacher again.") from error
    return index


def record_dtype(shapes: Mapping[str, list[int]], top_k: int | None) -> np.dtype[Any]:
    """Return the layout of a record for targets of these shapes (without the batch)."""
    fields: list[tuple[Any, ...]] = [("seed", "<u8"), ("image", "<u4")]
    for name, shape in shapes.items():
        if is_logits(name, shape):
            count = kept_logits(shape[0], top_k)
            ids = "<u2" if shape[0] <= 65_536 else "<u4"
            fields += [(f"{name}.top", "<f2", (count,)), (f"{name}.ids", ids, (count,)), (f"{name}.rest", "<f4")]
        else:
            fields += [(name, "<f2", tuple(shape)), (f"{name}.scale", "<f4")]
    return np.dtype(fields)


def is_logits(name: str, shape: Sequence[int]) -> bool:
    """Say whether a target holds logits of a whole image, of which a record keeps the largest."""
    return len(shape) == 1 and (name == "logits" or name.endswith(".logits"))


def kept_logits(classes: int, top_k: int | None) -> int:
    """Return the number of logits in a record."""
    return classes if top_k is None else min(classes, top_k)
