"""Training and validation from streams: Hugging Face datasets that are not downloaded first, and WebDataset shards."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hetkd.data.seeding import sample_seed, seeded
from hetkd.data.sets import hub_splits, import_datasets

SHUFFLED = 2048


def open_streams(data: str) -> dict[str, Any]:
    """Open the streams ``"train"`` and ``"val"`` of ``hf:NAME`` or ``wds:FOLDER``.

    The shards of a WebDataset are the folder's ``*train*.tar`` and ``*val*.tar``, with members KEY.jpg (or png, webp)
    and KEY.cls.

    Raises:
        ValueError: If a split is missing.
    """
    kind, _, name = data.partition(":")
    if kind == "hf":
        train, val = hub_splits(data, streaming=True)
        return {"train": train, "val": val}
    datasets = import_datasets(data)
    shards = {split: sorted(str(path) for path in Path(name).glob(f"*{split}*.tar")) for split in ("train", "val")}
    for split, files in shards.items():
        if not files:
            raise ValueError(f"{data!r} has no shards *{split}*.tar.")
    return {
        split: datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        for split, files in shards.items()
    }


class StreamLoader:
    """A loader of batches of uint8 images and labels from a stream; every process reads its own share, once.

    Args:
        stream: A ``datasets.IterableDataset`` of images and labels.
        transform: From a PIL image to a tensor.
        batch_size: Images a batch.
        workers: Processes that load, at most one a shard.
        seed: Of what is random in the transform, or ``None``.
    """

    def __init__(
        self,
        stream: Any,
        transform: Callable[[Any], torch.Tensor],
        *,
        batch_size: int,
        workers: int,
        seed: int | None = None,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        # Of the launcher's, since Accelerate's own state depends on options that fit knows.
        rank, self.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.batch_size = batch_size
        share = split_dataset_by_node(stream, rank, self.processes)
        self.samples = _Samples(share, transform, None if seed is None else (seed, rank))
        self.loader = DataLoader(self.samples, batch_size=batch_size, num_workers=min(workers, share.num_shards))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class TrainingStream(StreamLoader):
    """The same for training: shuffled, and with as many steps in all processes.

    A process whose share ends early starts it again. What is random about a sample is a pure function of seed, epoch,
    process and place in the stream, so that a run resumes exactly.

    Args:
        stream: As for `StreamLoader`; so are the other arguments.
        images: Of an epoch, of all processes together.
        seed: Of order and transform.
    """

    def __init__(self, stream: Any, transform: Callable[[Any], Any], *, images: int, seed: int, **options: int) -> None:
        super().__init__(stream.shuffle(seed=seed, buffer_size=SHUFFLED), transform, seed=seed, **options)
        self.steps = images // (self.batch_size * self.processes)
        if not self.steps:
            raise ValueError(f"{images} training images are no batch of {self.batch_size} for each process.")

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that order and randomness depend on."""
        self.samples.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._whole_batches(), self.steps)

    def _whole_batches(self) -> Iterator[Any]:
        while True:
            found = 0
            for batch in self.loader:
                if len(batch[0]) == self.batch_size:
                    found += 1
                    yield batch
            if not found:
                raise ValueError(
                    f"no loading process has {self.batch_size} images, a whole batch: use a smaller batch_size or "
                    "fewer workers."
                )


class _Samples(IterableDataset[Any]):
    def __init__(self, stream: Any, transform: Callable[[Any], torch.Tensor], seed: tuple[int, int] | None) -> None:
        self.stream, self.transform, self.seed, self.epoch = stream, transform, seed, 0

    def __iter__(self) -> Iterator[Any]:
        self.stream.set_epoch(self.epoch)
        worker = get_worker_info()
        reader = 0 if worker is None else worker.id
        for number, sample in enumerate(self.stream):
            image, label = _image_and_class(sample)
            if self.seed is None:
                yield self.transform(image), label
                continue
            with seeded(sample_seed((*self.seed, reader), self.epoch, number)):
                transformed = self.transform(image)
            yield transformed, label


def _image_and_class(sample: dict[str, Any]) -> tuple[Any, int]:
    image = next((sample[key] for key in ("image", "img", "jpg", "jpeg", "png", "webp") if key in sample), None)
    label = next((sample[key] for key in ("label", "fine_label", "cls") if key in sample), None)
    if image is None or label is None:
        raise ValueError(f"a sample has the keys {sorted(sample)}; it needs an image and a label.")
    return image, int(label)
