"""Single transforms against plain versions of them, the growth of the methods with sizes, and the time of imports."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timing import compare, take_turns
from torch import Tensor

from hetkd import SFKD, UHKD, Features, Method, Stage, StagePair
from hetkd.features.grid import to_grid
from hetkd.methods.common.low_frequency import View
from hetkd.methods.sfkd.ds2s import SpectralGate
from hetkd.spectral import dwt2, idwt2, low_frequencies, low_waves

CHANNELS, GRID, KEEP, LEVELS = 256, 16, 5, 2
SIZES = {"batch": (8, 16, 32, 64), "grid": (7, 14, 28), "channels": (64, 256, 1024), "levels": (0, 1, 2, 3)}


def bench_transforms(batch: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Compare forward and backward of each transform with a plain version."""
    torch.manual_seed(0)
    x = torch.randn(batch, CHANNELS, GRID, GRID, device=device, requires_grad=True)
    rows = []
    for name, ours, plain_name, plain in transforms(device):
        times = take_turns({"ours": with_backward(ours, x), "plain": with_backward(plain, x)}, repeats, device)
        ratio, quartiles = compare(times["ours"], times["plain"])
        rows.append(
            {
                "transform": name,
                "ms": 1e3 * statistics.median(times["ours"]),
                "against": plain_name,
                "plain_ms": 1e3 * statistics.median(times["plain"]),
                "ratio": ratio,
                "ratio_quartiles": quartiles,
            }
        )
    return rows


def transforms(device: torch.device) -> Iterator[tuple[str, Callable[[Tensor], Any], str, Callable[[Tensor], Any]]]:
    """Yield our transforms of ``[B, 256, 16, 16]`` beside plain versions."""
    import ptwt

    first = GRID // 2 - KEEP // 2

    def cropped_fft(x: Tensor) -> Tensor:
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))
        return torch.view_as_real(spectrum[..., first : first + KEEP, first : first + KEEP])

    waves = low_waves((12, 12), KEEP)[0].to(device)
    at_once = View((GRID, GRID), waves.cpu().unflatten(1, (12, 12))).to(device)

    def waves_of_resampled(x: Tensor) -> Tensor:
        return waves @ to_grid(x, (12, 12)).flatten(2).transpose(1, 2)

    half = GRID // 2  # bands of the first level, the largest that are gated
    gate = SpectralGate(CHANNELS, 4, (half, half)).to(device)
    torch.nn.init.normal_(gate.gate)
    folded = [min(row, half - row) for row in range(half)]

    def as_bands(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 4, half, half)

    def wavelet_and_back(x: Tensor) -> Tensor:
        return idwt2(dwt2(x, "haar", LEVELS), "haar")

    def wavelet_and_back_by_ptwt(x: Tensor) -> Any:
        return ptwt.waverec2(ptwt.wavedec2(x, "haar", level=LEVELS, mode="periodic"), "haar")

    yield "low_frequencies", lambda x: low_frequencies(x, KEEP), "torch.fft.fft2, cropped", cropped_fft
    yield (
        "to_grid",
        lambda x: to_grid(x, (12, 12)),
        "F.interpolate",
        lambda x: F.interpolate(x, (12, 12), mode="bilinear", antialias=True),
    )
    yield "dwt2, idwt2", wavelet_and_back, "ptwt", wavelet_and_back_by_ptwt
    yield (
        "SpectralGate",
        lambda x: gate(as_bands(x)),
        "torch.fft.rfft2, irfft2",
        lambda x: torch.fft.irfft2(torch.fft.rfft2(as_bands(x)) * gate.gate[:, :, folded], s=(half, half)),
    )
    yield "resampling and waves at once", at_once, "one after the other", waves_of_resampled


def with_backward(function: Callable[[Tensor], Any], x: Tensor) -> Callable[[], None]:
    """Return a call of the function with its backward."""

    def run() -> None:
        result = function(x)
        result.backward(torch.ones_like(result))

    return run


def bench_growth(repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure encode, forward and backward of the methods alone, while one size varies at a time."""
    base = {"batch": 16, "grid": 14, "channels": 256, "levels": 2}
    makers: dict[str, Callable[[int], Method]] = {
        "uhkd": lambda levels: UHKD(),
        "sfkd": lambda levels: SFKD(),
        "sfkd ds2s": lambda levels: SFKD(levels=levels, ds2s="full"),
    }
    rows = []
    for name, make in makers.items():
        for size, values in SIZES.items():
            if size == "levels" and name != "sfkd ds2s":
                continue
            row: dict[str, Any] = {"method": name, "varies": size}
            for position, value in enumerate(values):
                now = {**base, size: value}
                step = method_step(make(now["levels"]), now["batch"], now["grid"], now["channels"], device)
                times = take_turns({"step": step}, max(3, repeats // 4), device)
                row[f"size {position + 1}"] = f"{value}: {1e3 * statistics.median(times['step']):.1f} ms"
            rows.append({**{f"size {number}": "" for number in range(1, 5)}, **row})
    return [{key: row[key] for key in ("method", "varies", *(f"size {n}" for n in range(1, 5)))} for row in rows]


def method_step(method: Method, batch: int, grid: int, channels: int, device: torch.device) -> Callable[[], None]:
    """Return encode, forward and backward of a method on random maps of one stage pair."""
    torch.manual_seed(0)
    stage = Stage("stage", channels, grid, grid)
    method.bind([StagePair(stage, stage)])
    method.to(device)
    maps = [torch.randn(batch, channels, grid, grid, device=device, requires_grad=need) for need in (False, True)]
    logits = [torch.randn(batch, 100, device=device, requires_grad=need) for need in (False, True)]
    teacher, student = (Features(logits[n], (maps[n],)) for n in (0, 1))
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        terms = method(student, method.encode(teacher), labels)
        torch.stack(list(terms.values())).sum().backward()

    return step


def bench_import(repeats: int) -> list[dict[str, Any]]:
    """Compare the time of ``import hetkd`` with that of ``import torch``, in processes that take turns."""
    times: dict[str, list[float]] = {"torch": [], "hetkd": []}
    for _ in range(max(repeats, 3) + 1):
        for module, seconds in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            seconds.append(time.perf_counter() - start)
    ratio, quartiles = compare(times["hetkd"][1:], times["torch"][1:])
    medians = {f"{module}_s": statistics.median(seconds[1:]) for module, seconds in times.items()}
    return [{**medians, "ratio": ratio, "ratio_quartiles": quartiles}]
