"""Compares distillation methods fairly: one protocol, the same initial students and data order for all, several seeds.

    python recipes/compare.py --dataset fashion --methods all --seeds 3          # within an hour on two cores
    python recipes/compare.py --dataset cifar100 --pairs convnext:deit vit:resnet18 --methods ce kd rsd sfkd
    python recipes/compare.py --dataset flowers/ --pixels 128 --methods kd kd+rsd uhkd --budget 120

A pair is TEACHER:STUDENT, each a short name of `hetkd.models.small` or one of timm's. A teacher that is not in
`--teachers`, where `research/small_teacher.py` puts them, is trained first.
Stopped and started again, it goes on where it was. In the output folder:
`results.jsonl` (one line a run), `table.md`, `gains.png`, `report.html`, `runs/` (students and histories).
"""

import argparse
import hashlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from rich.console import Console
from torch import nn

from hetkd import Combined, Distiller, list_methods
from hetkd.data import ImageData, load_images
from hetkd.models import build_small, load_weights, save_model
from hetkd.report.comparison import draw_gains, write_comparison, write_table
from hetkd.training import TrainingDiverged, TrainingOptions
from hetkd.training.records import PeakMemory, Row, read_rows, row_of, write_rows

ASSETS = Path(__file__).parent / "assets"
FIT_OPTIONS = ("epochs", "batch_size", "optimizer", "lr", "warmup_epochs", "mixed_precision")
console = Console(highlight=False, soft_wrap=True)


def main(words: list[str] | None = None) -> None:
    """Run what is not there yet, and write table and picture; ``words`` stand for the command line."""
    arguments = parse_arguments(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        data = load_data(arguments.dataset, arguments.pixels or 64).first(arguments.images).to(device)
        protocol = protocol_of(arguments, data)
        check_what_is_asked(arguments, data, protocol)
    except ValueError as error:
        raise SystemExit(f"compare.py: {error}") from error
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(folder / "results.jsonl")
    check_protocol(rows, protocol, folder)
    pairs = [tuple(pair.split(":")) for pair in arguments.pairs]
    teachers = {name: make_teacher(name, data, arguments) for name in dict.fromkeys(teacher for teacher, _ in pairs)}
    check_teachers(rows, teachers, folder)
    failures: dict[tuple[str, str], str] = {}
    start = time.perf_counter()
    for seed, pair, method in itertools.product(range(arguments.seeds), pairs, arguments.methods):
        name = ":".join(pair)
        if any((row["seed"], row["pair"], row["method"]) == (seed, name, method) for row in rows):
            continue
        if arguments.budget is not None and time.perf_counter() - start > 60 * arguments.budget:
            console.print(f"The budget of {arguments.budget:g} minutes is spent; the same command goes on.")
            break
        try:
            rows.append(run(data, teachers[pair[0]], pair, method, seed, protocol, folder))
        except (TrainingDiverged, ValueError) as error:  # one method that fails must not stop the others
            failures[name, method] = str(error)
            console.print(f"{name}  {method:<12} seed {seed}  failed: {error}")
            continue
        write_rows(folder / "results.jsonl", rows)
        write_table(rows, protocol, failures, folder / "table.md")
        console.print(f"{name}  {method:<12} seed {seed}  top-1 {rows[-1]['top1']:.2f} %")
    console.print("\n" + write_table(rows, protocol, failures, folder / "table.md"))
    draw_gains(rows, folder / "gains.png")
    try:
        if rows:
            console.print(f"report: {write_comparison(rows, protocol, failures, folder / 'report.html')}")
    except ImportError:
        console.print("No report: pip install 'hetkd[report]' for it.")


@dataclass(frozen=True)
class Teacher:
    """A trained teacher.

    Attributes:
        model: The module, in eval mode.
        size: Its input size.
        facts: Its name, accuracy and the digest of its weights, for the records.
    """

    model: nn.Module
    size: int
    facts: dict[str, Any]


def load_data(name: str, pixels: int) -> ImageData:
    """Load a data set; ``fashion`` is the part of Fashion-MNIST beside this script, or all of it."""
    if name != "fashion":
        return load_images(name, pixels)
    if not (ASSETS / "fashion_mnist").is_dir():
        return load_images("fashion-mnist")
    data = load_images(str(ASSETS / "fashion_mnist"))
    return ImageData(name, data.train, data.test, data.classes)


def augmentation(data: ImageData) -> Any:
    """Return a shift and a flip for colour images, a flip for grey ones."""
    return "light" if data.channels == 3 else K.RandomHorizontalFlip(p=0.5)


def protocol_of(arguments: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """Return what all runs have in common."""
    return {
        "dataset": data.name,
        "data": data.digest[:16],
        "train_images": len(data.train[0]),
        "test_images": len(data.test[0]),
        "student_pixels": arguments.pixels or 2 * data.pixels,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "optimizer": arguments.optimizer,
        "lr": arguments.lr,
        "warmup_epochs": min(2.0, arguments.epochs / 8),
        "mixed_precision": arguments.mixed_precision,
    }


def check_what_is_asked(arguments: argparse.Namespace, data: ImageData, protocol: dict[str, Any]) -> None:
    """Build every student and method once, and check the options, before anything is trained."""
    TrainingOptions.from_mapping({name: protocol[name] for name in FIT_OPTIONS if name != "epochs"})
    for pair in arguments.pairs:
        teacher, student = pair.split(":")
        build_small(teacher, data.pixels, data.classes, data.channels)
        build_small(student, protocol["student_pixels"], data.classes, data.channels)
    for method in arguments.methods:
        Combined(method.split("+"))


def check_protocol(rows: Sequence[Row], protocol: dict[str, Any], folder: Path) -> None:
    """Keep runs of different protocols out of one table."""
    for row in rows[:1]:
        before = row["protocol"]
        changed = {name: now for name, now in protocol.items() if before.get(name) != now}
        different = [f"{name} {before.get(name)!r}, now {now!r}" for name, now in changed.items()]
        if different:
            raise SystemExit(
                f"{folder} holds runs of another protocol ({'; '.join(different)}): choose another --output."
            )


def check_teachers(rows: Sequence[Row], teachers: dict[str, Teacher], folder: Path) -> None:
    """Keep runs under different teachers of one name out of one table."""
    for row in rows:
        name = row["teacher"]["name"]
        if name in teachers and teachers[name].facts["sha256"] != row["teacher"]["sha256"]:
            raise SystemExit(f"{folder} holds runs under another teacher {name!r}: choose another --output.")


def make_teacher(name: str, data: ImageData, arguments: argparse.Namespace) -> Teacher:
    """Load a teacher; it is trained here if there are no weights."""
    file = f"{data.name.replace('/', '_').replace(':', '_')}-{data.digest[:8]}-{data.pixels}px-{name}.safetensors"
    path = (arguments.teachers or arguments.output / "teachers") / file
    own = ASSETS / "vit_fashion_mnist.safetensors"
    if (name, data.name) == ("vit", "fashion") and own.exists():
        path = own
    if not path.exists():
        console.print(f"training the teacher {name} on {data.name} for {arguments.teacher_epochs} epochs")
        train_teacher(name, data, path, arguments.teacher_epochs)
    model, size = build_small(name, data.pixels, data.classes, data.channels)
    load_weights(model, path)
    model = model.eval().to(data.train[0].device)
    top1 = Distiller(None, model, "ce", input_size=size).evaluate(data.test)["top1"]
    console.print(f"teacher {name}: top-1 {top1:.2f} % ({path})")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Teacher(model, size, {"name": name, "top1": top1, "sha256": digest})


def train_teacher(name: str, data: ImageData, path: Path, epochs: int) -> None:
    """Train a teacher on the labels, as `research/small_teacher.py` does; stopped and started again, it goes on."""
    torch.manual_seed(0)
    model, size = build_small(name, data.pixels, data.classes, data.channels)
    Distiller(None, model.to(memory_format=torch.channels_last), "ce", input_size=size).fit(
        data.train,
        epochs=epochs,
        output_dir=path.with_suffix(""),
        resume=True,
        batch_size=128,
        warmup_epochs=min(2, epochs / 4),
        clip_grad=1.0,
        label_smoothing=0.1,
        augment=augmentation(data),
    )
    save_model(model.half(), path)


def run(
    data: ImageData,
    teacher: Teacher,
    pair: Sequence[str],
    method: str,
    seed: int,
    protocol: dict[str, Any],
    folder: Path,
) -> Row:
    """Train one student and return its line of results."""
    torch.manual_seed(seed)  # the same initial student for every method
    student, size = build_small(pair[1], protocol["student_pixels"], data.classes, data.channels)
    names = method.split("+")
    distiller = Distiller(
        teacher.model,
        student.to(data.train[0].device),
        names if len(names) > 1 else method,
        input_size={"teacher": teacher.size, "student": size},
    )
    path = folder / "runs" / f"{pair[0]}-{pair[1]}-{method}-{seed}"
    with PeakMemory() as memory:
        result = distiller.fit(
            data.train,
            data.test,
            output_dir=path,
            resume=True,
            augment=augmentation(data),
            seed=seed,
            **{name: protocol[name] for name in FIT_OPTIONS},
        )
    about = {"dataset": data.name, "pair": ":".join(pair), "method": method, "seed": seed}
    return row_of(distiller, result, memory, about) | {"protocol": protocol, "teacher": teacher.facts}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion", help="fashion, fashion-mnist, cifar100, hf:NAME or a folder")
    parser.add_argument("--pairs", nargs="+", default=["vit:mobilenetv3_small_050"], metavar="TEACHER:STUDENT")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], metavar="METHOD", help="names, 'kd+rsd' for both, or all"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no run after that time")
    parser.add_argument("--images", type=int, help="use only so many training images, as many of each class")
    parser.add_argument("--pixels", type=int, help="input of the student; default: twice the size of the images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument(
        "--teachers", type=Path, metavar="DIR", help="where trained teachers are; default: OUTPUT/teachers"
    )
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), metavar="DIR")
    arguments = parser.parse_args(words)
    for name in ("seeds", "epochs", "images", "teacher_epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for pair in arguments.pairs:
        if len(pair.split(":")) != 2 or not all(pair.split(":")):
            parser.error(f"--pairs {pair!r} is not TEACHER:STUDENT, such as vit:mobilenetv3_small_050")
    if arguments.budget is not None and arguments.budget < 0:
        parser.error("--budget must not be negative")
    every = [
        "ce",
        "kd",
        *(name for name in list_methods("classification") if name not in ("ce", "kd", "uhkd", "sfkd")),
        "uhkd",
        "sfkd",
    ]
    asked = itertools.chain.from_iterable(every if name == "all" else [name] for name in arguments.methods)
    arguments.methods = list(dict.fromkeys(asked))
    for name in itertools.chain.from_iterable(method.split("+") for method in arguments.methods):
        if name not in every:
            parser.error(f"--methods {name!r} is none of {', '.join(every)}")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.")
        sys.exit(130)
