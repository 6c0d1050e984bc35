"""Steps of a small student whose teacher's features are recorded: where a method's own work counts most."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from steps import FLOOR, REFINED, make_optimizer, measure_in_turns
from timing import median_interval, operations_of, peak_memory

from hetkd import SFKD, Distiller, Method
from hetkd.methods.common.stagewise import count_parameters
from hetkd.models import build_small

TEACHER, STUDENT, PIXELS, CLASSES, BATCH = "mixer", "resnet_slim", 32, 100, 64
METHODS = ["kd", "dkd", "dist", "fitnet", "ofa", "rsd", "crd", "uhkd", "sfkd", REFINED]


def bench_small_student(repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Compare steps (encoding of recorded features, student, loss, backward, update) with those of ``ce``."""
    made = {FLOOR: make_step("ce", device), **{name: make_step(name, device) for name in METHODS}}
    times = measure_in_turns({name: step for name, (step, *_) in made.items()}, repeats, device)
    floor_memory = peak_memory(made[FLOOR][0], device, *made[FLOOR][1:])
    rows = []
    for name, (step, distiller, optimizer) in made.items():
        taken, ratios = times[name]
        low, high = median_interval(ratios)
        rows.append(
            {
                "method": "ce" if name == FLOOR else name,
                "ms": 1e3 * statistics.median(taken),
                "ratio": statistics.median(ratios),
                "ratio_interval": f"{low:.3f} to {high:.3f}",
                "memory_ratio": peak_memory(step, device, distiller, optimizer) / floor_memory,
                "added_parameters": count_parameters(distiller.method),
                "operations": operations_of(step),
            }
        )
    return rows


def make_step(name: str, device: torch.device) -> tuple[Callable[[], None], Distiller, torch.optim.Optimizer]:
    """Return a training step on features that are there, and what it works with."""
    torch.manual_seed(0)
    teacher, student = (build_small(model, PIXELS, CLASSES, 3)[0] for model in (TEACHER, STUDENT))
    student = student.to(memory_format=torch.channels_last)
    method: str | Method = SFKD(ds2s="full") if name == REFINED else name
    if name == "ce":
        distiller = Distiller(None, student, "ce", input_size=PIXELS)
    else:
        distiller = Distiller(teacher, student, method, input_size={"teacher": PIXELS, "student": PIXELS})
    distiller.to(device).train()
    optimizer = make_optimizer(distiller)
    images = torch.randint(256, (BATCH, 3, PIXELS, PIXELS), dtype=torch.uint8, device=device)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    with torch.no_grad():
        features = [tap.run(images) for role, tap in distiller.taps.items() if role != "student"]

    def step() -> None:
        targets = distiller.method.encode(*features) if features else None
        distiller(images, labels, targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, distiller, optimizer
