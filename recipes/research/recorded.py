"""What a teacher says of some fixed views of every image, on disk once for all methods, students and seeds.

`Distiller.cache_teacher` keeps what one method needs; a comparison of many methods keeps the features themselves.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetkd import Distiller, Features
from hetkd.features.pairing import POOLED
from hetkd.utils.files import write_json

SHIFT = 4
_FACTS, _CHUNK = "facts.json", 128


def view_of(images: Tensor, index: Tensor, view: int) -> Tensor:
    """Return one view of some images: shifted by up to four pixels, flipped or not, always in the same way.

    Args:
        images: uint8 ``[N, C, H, W]``.
        index: Of the images that are wanted, ``[B]``.
        view: From 0; each image has its own shift and flip in each.

    Returns:
        uint8 ``[B, C, H, W]``.
    """
    count, _, height, width = images.shape
    generator = torch.Generator().manual_seed(1_000 + view)
    shifts = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator)[index]
    flipped = torch.rand(count, generator=generator)[index] < 0.5
    padded = torch.nn.functional.pad(images[index], (SHIFT,) * 4)
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.where(flipped[:, None], torch.arange(width).flip(0), torch.arange(width))
    picked = padded.permute(0, 2, 3, 1)[torch.arange(len(index))[:, None, None], rows[:, :, None], columns[:, None]]
    return picked.permute(0, 3, 1, 2).contiguous()


class RecordedViews:
    """Features of a teacher for all views of all images, in half precision, read from disk where they are needed.

    Args:
        folder: That `record_views` wrote.

    Raises:
        ValueError: If it is not complete.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / _FACTS).exists():
            raise ValueError(f"{folder} holds no recorded teacher: `study.py record` makes one.")
        facts = json.loads((folder / _FACTS).read_text())
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in facts["arrays"]}

    def features(self, stages: Sequence[str], view: int, index: Tensor) -> Features:
        """Return what the teacher yields at these stages for some images, in float32."""

        def read(name: str) -> Tensor:
            return torch.from_numpy(self._arrays[name][view, index.numpy()].astype(np.float32))

        pooled = read(POOLED)
        maps = tuple(pooled[:, :, None, None] if name == POOLED else read(name) for name in stages)
        return Features(read("logits"), maps, pooled)


@torch.no_grad()
def record_views(distiller: Distiller, images: Tensor, views: int, folder: Path) -> None:
    """Run the teacher of a distiller over all views of all images, and write what comes out at its stages.

    Args:
        distiller: With one teacher, tapped at the stages that are to be recorded.
        images: uint8 ``[N, C, H, W]``.
        views: How many.
        folder: To write to; one that is complete is left as it is.

    Raises:
        ValueError: If the folder holds what another teacher says, or of other images, views or stages.
    """
    tap, stages = distiller.taps["teacher"], distiller.method.teacher_stages()
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    facts: dict[str, Any] = {"teacher": distiller.teachers.fingerprints(), "images": digest, "views": views}
    names = [*stages, "logits", POOLED]
    if (folder / _FACTS).exists():
        before = json.loads((folder / _FACTS).read_text())
        changed = [name for name, value in {**facts, "arrays": names}.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{folder} was recorded with other {' and '.join(changed)}: delete it.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.memmap] = {}
    for view in range(views):
        for index in torch.arange(len(images)).split(_CHUNK):
            features = tap.run(view_of(images, index, view))
            found = dict(zip(stages, features.maps, strict=True))
            found |= {"logits": features.logits, POOLED: features.pooled}
            for name, x in found.items():
                if name not in arrays:
                    shape = (views, len(images), *x.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
                half = x.half()
                assert half.isfinite().all(), f"{name} does not fit in half precision"
                arrays[name][view, index.numpy()] = half.numpy()
    for array in arrays.values():
        array.flush()
    write_json(folder / _FACTS, {**facts, "arrays": names})
