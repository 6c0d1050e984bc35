"""Samplers of any kind: the same draws in all processes, and a function of seed and epoch alone."""

import copy
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from hetkd.data.seeding import sample_seed, seeded
from hetkd.utils.distributed import world_size


class DrawnSampler(Sampler[Any]):
    """The draws of another sampler or batch sampler, made at once under a seed and shared by all processes.

    Without it a process draws from its own generator, so that several processes see some images twice and others not at
    all, and a resumed run sees another order.

    Args:
        inner: A sampler, or a batch sampler, with a length.
        seed: Seed of the draws.
    """

    def __init__(self, inner: Any, seed: int) -> None:
        self.inner, self.seed, self.epoch = inner, seed, 0
        self.batch_size, self.drop_last = getattr(inner, "batch_size", None), getattr(inner, "drop_last", False)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the draws depend on."""
        self.epoch = epoch
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        seed = sample_seed(self.seed, self.epoch, 0)
        with seeded(seed):
            for each in (self.inner, getattr(self.inner, "sampler", None)):
                generator = getattr(each, "generator", None)
                if generator is not None:
                    generator.manual_seed(seed % 2**63)
            drawn = [list(self.inner)]
        if world_size() > 1:
            dist.broadcast_object_list(drawn)
        yield from drawn[0]


def set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a loader and of its samplers, however deep they are wrapped."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if isinstance(sampler, DrawnSampler):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def with_drawn_samples(loader: Any, what: str, seed: int) -> Any:
    """Return a loader whose sampler draws alike in all processes and in a resumed run.

    Plain sequential and random samplers, which Accelerate takes care of, stay.

    Args:
        loader: A ``DataLoader``; it is left as it is.
        what: Name of the argument, for errors.
        seed: Seed of the draws.

    Raises:
        ValueError: If its sampler shares the data out already.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    batches, sampler = loader.batch_sampler, loader.sampler
    for each in (sampler, batches):
        if hasattr(each, "num_replicas"):
            raise ValueError(
                f"{what} has a {type(each).__name__}, which shares the data out already: give a loader without it "
                "(shuffle=True); fit shares it out to all processes."
            )
    if type(batches) is not BatchSampler:
        return loader if batches is None or not hasattr(batches, "__len__") else _rebuilt(loader, batches, seed)
    if type(sampler) in (RandomSampler, SequentialSampler) or not hasattr(sampler, "__len__"):
        return loader
    drawn = copy.copy(batches)
    drawn.sampler = DrawnSampler(sampler, seed)
    return _rebuilt(loader, drawn, None)


def _rebuilt(loader: DataLoader[Any], batches: Any, seed: int | None) -> DataLoader[Any]:
    """Return a copy of a loader with another batch sampler, itself drawn under the seed if there is one."""
    new = copy.copy(loader)
    batch_sampler = batches if seed is None else DrawnSampler(batches, seed)
    # DataLoader refuses to set these, since its own iterators would not notice; no iterator exists yet.
    object.__setattr__(new, "batch_sampler", batch_sampler)
    if seed is None:
        object.__setattr__(new, "sampler", batches.sampler)
    return new
