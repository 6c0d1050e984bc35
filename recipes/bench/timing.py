"""How benchmarks measure: functions that take turns, medians and their spread, peaks of memory."""

import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

WARM_UP = 2


def take_turns(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time functions in turns, in another order in every round.

    Returns:
        Seconds of each call, by the name of the function, without the rounds that warm up.
    """
    generator, names = random.Random(0), list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats + WARM_UP):
        for name in generator.sample(names, len(names)):
            elapsed = seconds_of(functions[name], device)
            if round_ >= WARM_UP:
                times[name].append(elapsed)
    return times


def compare(times: list[float], reference: list[float]) -> tuple[float, str]:
    """Return the ratio of two medians, and the quartiles of the ratios within the rounds, as text."""
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(times) / statistics.median(reference), f"{low:.3f} to {high:.3f}"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return where the median lies with 95 % confidence, whatever the distribution: two of the values (binomial).

    Fewer than six values cannot tell: then their extremes.
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 1, 0  # how many of 2^n ways have at most `rank` values below the median
    while outside / 2**n <= 0.025:
        rank += 1
        outside += math.comb(n, rank)
    first = max(rank - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    start = now(device)
    function()
    return now(device) - start


def now(device: torch.device) -> float:
    """Return the time in seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(function: Callable[[], Any], device: torch.device, *held: Any) -> int:
    """Return the most bytes of tensors that are alive at a time while a function runs.

    Args:
        function: What is measured.
        device: Where it computes.
        *held: Modules, optimizers and tensors that were there before and count as well; nothing else does.
    """
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in _tensors(held)}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before
    with _AliveTensors(set(storages)) as alive:
        function()
    return sum(storages.values()) + alive.peak


def operations_of(function: Callable[[], Any]) -> int:
    """Return how many of PyTorch's operations a function runs, views aside: about the kernels that a GPU launches."""
    with _Counted() as counted:
        function()
    return counted.operations


def _tensors(held: Iterable[Any]) -> Iterator[Tensor]:
    for item in held:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, nn.Module):
            yield from (*item.parameters(), *item.buffers())
        else:
            yield from (x for state in item.state.values() for x in state.values() if isinstance(x, Tensor))


class _Counted(TorchDispatchMode):
    """Counts operations."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


class _AliveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and forgets each when it is freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.alive, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size
