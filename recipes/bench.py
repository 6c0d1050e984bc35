"""What hetkd costs, as ratios measured side by side in one run.

    python recipes/bench.py tap                     # the tap against a plain forward
    python recipes/bench.py tap --models timm:resnet18 --repeats 60 --json tap.json
    python recipes/bench.py loop                    # `fit` on a small data set against the bare step
    python recipes/bench.py cache                   # an epoch from the teacher cache against plain training

`tap`: plain and tapped forward passes of one model take turns; the figures are medians of their times,
the quartiles of the ratio of neighbours, and the ratio of the peaks of memory.

`loop`: images a second of `fit`, which draws, augments and accounts for batches of a data set that stays on the
device as uint8, against the same step (forward of both models, loss, backward, update) on one batch again and again.

`cache`: seconds of an epoch of `fit` with the teacher live and from the cache, against the student alone (`ce`), on the
same images; the three take turns, and the figures are medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from hetkd import Distiller, load_model
from hetkd.adapter import find_adapter, probe
from hetkd.plan import choose_stages

PIXELS = 224
MODELS = [
    "timm:resnet18",
    "timm:vit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
    "timm:mixer_s32_224",
    "torchvision:mobilenet_v2",
    "torchvision:vit_b_32",
]


def main() -> None:
    """Measures, prints a table, and writes the rows."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.what == "tap":
        rows = [bench_tap(name, device, arguments) for name in arguments.models]
    elif arguments.what == "cache":
        rows = [bench_cache(method, device, arguments) for method in ("kd", "uhkd", "sfkd")]
    else:
        rows = [bench_loop(method, device, arguments) for method in ("ce", "kd", "sfkd")]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    table = Table(title=f"{arguments.what}, {device}{threads}, batch {arguments.batch_size}")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def bench_tap(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares a model's forward with and without the tap at its four stages."""
    model = load_model(name, pretrained=False).eval().to(device)
    images = torch.rand(arguments.batch_size, 3, PIXELS, PIXELS, device=device)
    adapter = find_adapter(model)
    stages = [stage.name for stage in choose_stages(probe(adapter, model, images[:1])[0])]

    def plain() -> Any:
        return model(images)

    def tapped() -> Any:
        return adapter.run(model, images, stages)

    with torch.no_grad():
        plain_times, tapped_times = take_turns(plain, tapped, arguments.repeats, device)
        memory = peak_memory(tapped, model, images) / peak_memory(plain, model, images)
    ratios = [t / p for p, t in zip(plain_times, tapped_times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "plain_ms": 1e3 * statistics.median(plain_times),
        "tapped_ms": 1e3 * statistics.median(tapped_times),
        "ratio": statistics.median(tapped_times) / statistics.median(plain_times),
        "ratio_quartiles": f"{low:.3f} to {high:.3f}",
        "memory_ratio": memory,
    }


def bench_loop(method: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares `fit` on small images on the device with the step alone."""
    batch = arguments.batch_size
    images = torch.randint(256, (batch * arguments.repeats, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(100, (len(images),), device=device)
    teacher = load_model("timm:test_vit", pretrained=False, num_classes=100).to(device)
    student = load_model("timm:resnet10t", pretrained=False, num_classes=100).to(device)
    distiller = Distiller(teacher, student, method, input_size={"teacher": 160, "student": 64})
    optimizer = torch.optim.AdamW(distiller.parameters(), fused=device.type == "cuda")

    def step() -> None:
        distiller(images[:batch], labels[:batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    distiller.train()
    bare, _ = take_turns(step, lambda: None, arguments.repeats, device)
    flip = K.RandomHorizontalFlip(p=0.5)
    result = distiller.fit((images, labels), epochs=2, batch_size=batch, augment=flip, progress=False)
    again, _ = take_turns(step, lambda: None, arguments.repeats, device)
    bare_speed, loop_speed = batch / statistics.median(bare + again), result.history[-1]["images_per_second"]
    return {
        "method": method,
        "step_images_per_second": bare_speed,
        "fit_images_per_second": loop_speed,
        "ratio": loop_speed / bare_speed,
    }


def bench_cache(method: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares epochs with the teacher live, from the cache, and without it."""
    images = torch.randint(256, (arguments.batch_size * arguments.repeats, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(100, (len(images),))
    teacher = load_model("timm:vit_tiny_patch16_224", pretrained=False, num_classes=100, img_size=64).to(device)

    def seconds(method: str, **options: Any) -> float:
        student = load_model("timm:resnet10t", pretrained=False, num_classes=100).to(device)
        distiller = Distiller(teacher, student, method, input_size={"teacher": 64, "student": 64})
        if options:
            distiller.cache_teacher((images, labels), options["teacher_cache"], progress=False)
        result = distiller.fit((images, labels), epochs=1, batch_size=arguments.batch_size, progress=False, **options)
        return result.history[0]["seconds"]

    times: dict[str, list[float]] = {"alone": [], "live": [], "cached": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(4):
            times["alone"].append(seconds("ce"))
            times["live"].append(seconds(method))
            times["cached"].append(seconds(method, teacher_cache=folder))
    alone, live, cached = (statistics.median(of_kind[1:]) for of_kind in times.values())  # the first warms up
    return {
        "method": method,
        "alone_s": alone,
        "live_s": live,
        "cached_s": cached,
        "live_ratio": live / alone,
        "cached_ratio": cached / alone,
    }


def take_turns(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Times two functions in turns, each going first in every other round."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 2):
        order = ((0, first), (1, second)) if round_ % 2 else ((1, second), (0, first))
        for index, function in order:
            start = now(device)
            function()
            elapsed = now(device) - start
            if round_ >= 2:  # the first rounds warm up
                times[index].append(elapsed)
    return times


def now(device: torch.device) -> float:
    """Returns the time in seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(function: Callable[[], Any], model: nn.Module, images: Tensor) -> int:
    """Returns the most bytes of tensors, weights and images included, that are alive at a time."""
    tracker = MemTracker()
    tracker.track_external(model, images)
    with tracker:
        function()
    return tracker.get_tracker_snapshot("peak")[images.device]["Total"]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["tap", "loop", "cache"], default="tap")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"models that take {PIXELS} px")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
