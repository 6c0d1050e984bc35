"""What `gpu.py` works on: the session's time and lines, the images, and a teacher whose features are recorded."""

import argparse
import json
import math
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from recorded import SHIFT
from study import accuracy
from timing import now
from torch import Tensor, nn

from hetkd import Distiller, Features
from hetkd.data import cifar100_split
from hetkd.data.sets import Labelled
from hetkd.features.pairing import POOLED
from hetkd.methods.common.method import Targets
from hetkd.models import build_small, load_weights, save_model
from hetkd.training.records import Row, git_revision, machine

TEACHER, TEACHER_PIXELS, PIXELS = "tf_efficientnet_lite0", 96, 32
RECIPE: dict[str, Any] = {"epochs": 10, "lr": 1e-3, "weight_decay": 0.05, "batch_size": 256, "warmup": 0.1}
RECORDED_AT_ONCE = 1_000


@dataclass
class Session:
    """The device, the time that is left, and the file of lines, ``OUTPUT/NAME.jsonl``."""

    device: torch.device
    seconds: float
    output: Path
    facts: Row
    name: str = "gpu"
    start: float = field(default_factory=time.perf_counter)
    failed: int = 0

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.perf_counter() - self.start)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{self.seconds - self.left:5.0f} s] {text}", flush=True)

    def write(self, step: str, **facts: Any) -> None:
        """Add a line to the file at once."""
        with (self.output / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **facts, **self.facts, "elapsed": self.seconds - self.left}) + "\n")

    def attempt(self, what: str, function: Callable[[], Any]) -> bool:
        """Call a function; if it fails, write why and go on, for the other figures are wanted; say if it went well."""
        try:
            function()
        except Exception as error:  # whatever a compiler, a driver or a full memory refuses
            traceback.print_exc()
            self.write("failed", what=what, error=f"{type(error).__name__}: {str(error)[:500]}")
            self.failed += 1
            return False
        return True

    def autocast(self, enabled: bool = True, cache: bool = True) -> AbstractContextManager[None]:
        """Compute in bfloat16 where that is safe."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)


def start_session(arguments: argparse.Namespace, name: str) -> Session:
    """Return a session with the facts that every line has."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    torch.backends.cudnn.benchmark = True
    arguments.output.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("hetkd", "torch", "timm")} | {"cuda": torch.version.cuda}
    facts = {"git_revision": arguments.revision or git_revision(), "machine": machine(), "versions": versions}
    return Session(device, 60 * arguments.minutes, arguments.output, facts, name)


@dataclass
class Recorded:
    """Fixed views of the training images, and what the teacher says of them, all on the device.

    Attributes:
        images: uint8 ``[views, N, 3, 32, 32]``.
        labels: ``[N]``.
        features: By the name of a stage, and of ``logits`` and the pooled vector: half precision ``[views, N, ...]``.
    """

    images: Tensor
    labels: Tensor
    features: dict[str, Tensor]

    def targets(self, distiller: Distiller, view: int, index: Tensor) -> Targets:
        """Return the method's targets for some images."""
        names = distiller.method.teacher_stages()
        found = {name: self.features[name][view][index] for name in {*names, "logits", POOLED}}
        pooled = found[POOLED]
        maps = tuple(pooled[:, :, None, None] if name == POOLED else found[name] for name in names)
        return distiller.method.encode(Features(found["logits"], maps, pooled))


def load_data(arguments: argparse.Namespace, device: torch.device) -> tuple[Labelled, Labelled]:
    """Load CIFAR-100, or as many of its images as asked for, evenly spread, or random ones."""
    if arguments.random:
        labels = torch.arange(arguments.images) % 10
        images = torch.randint(256, (2, len(labels), 3, PIXELS, PIXELS), dtype=torch.uint8)
        return (images[0].to(device), labels.to(device)), (images[1].to(device), labels.to(device))
    splits = []
    for split in ("train", "test"):
        images, labels = cifar100_split(split)
        some = torch.linspace(0, len(labels) - 1, min(arguments.images, len(labels))).long()
        splits.append((images[some].to(device), labels[some].to(device)))
    return splits[0], splits[1]


def view_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to four pixels, reflected at the border, and flip every second one.

    Args:
        images: ``[B, C, H, W]``.
        generator: On the CPU.

    Returns:
        ``[B, C, H, W]``, in memory format channels_last.
    """
    (count, _, height, width), device = images.shape, images.device
    shifts = (torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator) - SHIFT).to(device)
    flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    across = torch.arange(width, device=device)
    rows = reflected(torch.arange(height, device=device) + shifts[0], height)
    columns = reflected(torch.where(flipped, across.flip(0), across) + shifts[1], width)
    picked = images.permute(0, 2, 3, 1)[
        torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None]
    ]
    return picked.permute(0, 3, 1, 2)


def reflected(index: Tensor, size: int) -> Tensor:
    """Reflect indices outside of ``0 ... size - 1`` at the border."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def get_teacher(session: Session, arguments: argparse.Namespace, train: Labelled, test: Labelled) -> nn.Module:
    """Load the teacher, or fine-tune and save it; write its accuracy."""
    kept, start = arguments.teacher or session.output / "teacher.safetensors", time.perf_counter()
    weights = False if arguments.random or kept.exists() else arguments.weights
    teacher, _ = build_small(TEACHER, TEACHER_PIXELS, arguments.classes, 3, pretrained=weights)
    distiller = Distiller(None, teacher.to(session.device), "ce", input_size=TEACHER_PIXELS)
    teacher.to(memory_format=torch.channels_last)
    steps = 0
    if kept.exists():
        load_weights(teacher, kept)
    else:
        steps = fine_tune(session, distiller, train, arguments)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_model(teacher, kept)
    seconds = now(session.device) - start
    with session.autocast():
        top1 = accuracy(distiller, test)
    session.write("teacher", model=TEACHER, steps=steps, seconds=seconds, test=top1, recipe=RECIPE)
    session.say(f"teacher: {top1:.2f} % after {steps} steps in {seconds:.0f} s")
    return teacher.eval()


def fine_tune(session: Session, distiller: Distiller, train: Labelled, arguments: argparse.Namespace) -> int:
    """Train with a warm-up and a cosine that ends after all epochs or when the time is over; return the steps."""
    images, labels = train
    batch = min(RECIPE["batch_size"], arguments.batch_size)
    epochs = 1 if arguments.dry else RECIPE["epochs"]
    total, step, progress = epochs * (len(labels) // batch), 0, 0.0
    rate, decay, warmup = (float(RECIPE[name]) for name in ("lr", "weight_decay", "warmup"))
    torch.manual_seed(0)
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=rate, weight_decay=decay, fused=True)
    distiller.train()
    while progress < 1:
        for index in torch.randperm(len(labels), generator=generator).to(session.device).split(batch):
            if len(index) < batch or progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (progress + 1e-3) / warmup) * (1 + math.cos(math.pi * progress)) / 2
            with session.autocast():
                loss = distiller(view_of(images[index], generator), labels[index]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress = max(step / total, (time.perf_counter() - start) / arguments.teacher_seconds)
    return step


@torch.no_grad()
def record(session: Session, teacher: nn.Module, train: Labelled, arguments: argparse.Namespace) -> Recorded:
    """Draw the views, and run the teacher over them at all stages that the methods compare for any student."""
    start, (images, labels) = now(session.device), train
    taps = [
        make_distiller(teacher, build_student(name, arguments.classes).to(session.device), "fitnet").taps["teacher"]
        for name in arguments.students
    ]
    names = list(dict.fromkeys(name for tap in taps for name in tap.names))
    taps[0].select(names)
    generator, features = torch.Generator().manual_seed(1), dict[str, Tensor]()
    views = torch.stack([view_of(images, generator) for _ in range(arguments.views)])
    for view in range(len(views)):
        for part in torch.arange(len(labels), device=session.device).split(RECORDED_AT_ONCE):
            with session.autocast():
                found = taps[0].run(views[view][part])
            for name, x in zip([*names, "logits", POOLED], [*found.maps, found.logits, found.pooled], strict=True):
                if name not in features:
                    shape = (len(views), len(labels), *x.shape[1:])
                    features[name] = torch.empty(shape, dtype=torch.float16, device=session.device)
                features[name][view, part] = x.half()
    finite = all(bool(x[0].isfinite().all()) for x in features.values())
    seconds, size = now(session.device) - start, sum(x.nbytes for x in features.values())
    session.write("record", stages=names, views=len(views), seconds=seconds, bytes=size, finite=finite)
    session.say(f"recorded {len(views)} views at {', '.join(names)}: {size / 2**30:.1f} GiB in {seconds:.0f} s")
    return Recorded(views, labels, features)


def build_student(name: str, classes: int) -> nn.Module:
    """Build a student with the stem that is usual for images of 32 px; other names are `build_small`'s."""
    if name == "resnet18":
        student = timm.create_model("resnet18", num_classes=classes)
        student.conv1, student.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    elif name == "mobilenetv2":
        student = timm.create_model("mobilenetv2_100", num_classes=classes)
        student.conv_stem.stride = (1, 1)
    else:
        student = build_small(name, PIXELS, classes, 3)[0]
    return student.to(memory_format=torch.channels_last)


def make_distiller(teacher: nn.Module, student: nn.Module, method: str, **options: Any) -> Distiller:
    """Make a distiller at the sizes of the study."""
    if method == "ce":
        return Distiller(None, student, "ce", input_size=PIXELS, **options)
    return Distiller(teacher, student, method, input_size={"teacher": TEACHER_PIXELS, "student": PIXELS}, **options)
