"""The tap, the training loop and the teacher cache, each against the same work without it."""

import argparse
import statistics
import tempfile
from typing import Any

import kornia.augmentation as K
import torch
from steps import PIXELS
from timing import compare, peak_memory, take_turns

from hetkd import Distiller, load_model
from hetkd.features.pairing import choose_stages
from hetkd.features.probe import probe
from hetkd.features.registry import find_adapter

MODELS = [
    "timm:resnet18",
    "timm:vit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
    "timm:mixer_s32_224",
    "torchvision:mobilenet_v2",
    "torchvision:vit_b_32",
]


def bench_tap(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare a model's forward with and without the tap at its four stages."""
    model = load_model(name, pretrained=False).eval().to(device)
    images = torch.rand(arguments.batch_size, 3, PIXELS, PIXELS, device=device)
    adapter = find_adapter(model)
    stages = [stage.name for stage in choose_stages(probe(adapter, model, images[:1])[0])]

    def plain() -> Any:
        return model(images)

    def tapped() -> Any:
        return adapter.run(model, images, stages)

    with torch.no_grad():
        times = take_turns({"plain": plain, "tapped": tapped}, arguments.repeats, device)
        memory = peak_memory(tapped, device, model, images) / peak_memory(plain, device, model, images)
    ratio, quartiles = compare(times["tapped"], times["plain"])
    return {
        "model": name,
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "tapped_ms": 1e3 * statistics.median(times["tapped"]),
        "ratio": ratio,
        "ratio_quartiles": quartiles,
        "memory_ratio": memory,
    }


def bench_loop(method: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare `fit` on small images on the device with the step alone."""
    batch = arguments.batch_size
    images = torch.randint(256, (batch * arguments.repeats, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(100, (len(images),), device=device)
    teacher = load_model("timm:test_vit", pretrained=False, num_classes=100).to(device)
    student = load_model("timm:resnet10t", pretrained=False, num_classes=100).to(device)
    distiller = Distiller(teacher, student, method, input_size={"teacher": 160, "student": 64})
    optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)  # as `fit` does

    def step() -> None:
        distiller(images[:batch], labels[:batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    distiller.train()
    bare = take_turns({"step": step}, arguments.repeats, device)["step"]
    flip = K.RandomHorizontalFlip(p=0.5)
    result = distiller.fit((images, labels), epochs=2, batch_size=batch, augment=flip, progress=False)
    again = take_turns({"step": step}, arguments.repeats, device)["step"]
    bare_speed, loop_speed = batch / statistics.median(bare + again), result.history[-1]["images_per_second"]
    return {
        "method": method,
        "step_images_per_second": bare_speed,
        "fit_images_per_second": loop_speed,
        "ratio": loop_speed / bare_speed,
    }


def bench_cache(method: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare epochs with the teacher live, from the cache, and without it."""
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
