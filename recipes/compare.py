"""Compares distillation methods fairly: one protocol, the same initial students and data order for all, several seeds.

    python recipes/compare.py --dataset fashion --methods all --seeds 3          # within an hour on two cores
    python recipes/compare.py --dataset cifar100 --pairs convnext:deit vit:resnet18 --methods ce kd rsd sfkd
    python recipes/compare.py --dataset flowers/ --pixels 128 --methods kd kd+rsd uhkd --budget 120

A pair is TEACHER:STUDENT, each a short name of `zoo.py` or one of timm's. A teacher that is not in `--teachers` is
trained first (`train_teacher.py`). Stopped and started again, it goes on where it was. In the output folder:
`results.jsonl` (one line a run), `table.md`, `gains.png`, `runs/` (students and histories).
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fashion import TEACHER
from image_data import ImageData, augmentation, load_images
from results import PeakMemory, Row, draw_gains, read_rows, row_of, write_rows, write_table
from rich.console import Console
from torch import nn
from train_teacher import teacher_path, train_teacher
from zoo import build

from hetkd import Distiller, list_methods
from hetkd.files import write_json
from hetkd.models import load_weights

console = Console(highlight=False, soft_wrap=True)


def main(words: list[str] | None = None) -> None:
    """Runs what is not there yet, and writes table and picture; ``words`` stand for the command line."""
    arguments = parse_arguments(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_images(arguments.dataset, arguments.pixels or 64).first(arguments.images).to(device)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    protocol = protocol_of(arguments, data)
    check_protocol(folder / "protocol.json", protocol)
    rows = read_rows(folder / "results.jsonl")
    pairs = [tuple(pair.split(":")) for pair in arguments.pairs]
    teachers = {name: make_teacher(name, data, arguments) for name in dict.fromkeys(teacher for teacher, _ in pairs)}
    start = time.perf_counter()
    for seed, pair, method in itertools.product(range(arguments.seeds), pairs, arguments.methods):
        if any((row["seed"], row["pair"], row["method"]) == (seed, ":".join(pair), method) for row in rows):
            continue
        if arguments.budget is not None and time.perf_counter() - start > 60 * arguments.budget:
            console.print(f"The budget of {arguments.budget:g} minutes is spent; the same command goes on.")
            break
        rows.append(run(data, teachers[pair[0]], pair, method, seed, protocol, folder))
        write_rows(folder / "results.jsonl", rows)
        console.print(f"{rows[-1]['pair']}  {method:<12} seed {seed}  top-1 {rows[-1]['top1']:.2f} %")
    console.print("\n" + write_table(rows, protocol, folder / "table.md"))
    draw_gains(rows, folder / "gains.png")


def protocol_of(arguments: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """Returns what all runs have in common."""
    return {
        "dataset": data.name,
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


def check_protocol(path: Path, protocol: dict[str, Any]) -> None:
    """Keeps runs of different protocols out of one table."""
    if path.exists():
        before = json.loads(path.read_text())
        different = [
            f"{name} {before.get(name)!r}, now {value!r}"
            for name, value in protocol.items()
            if before.get(name) != value
        ]
        if different:
            raise SystemExit(
                f"{path.parent} holds runs of another protocol ({'; '.join(different)}): choose another --output."
            )
    write_json(path, protocol)


def make_teacher(name: str, data: ImageData, arguments: argparse.Namespace) -> tuple[nn.Module, int]:
    """Returns a trained teacher and its input size; it is trained here if there are no weights."""
    path = teacher_path(arguments.teachers or arguments.output / "teachers", data, name)
    if (name, data.name) == ("vit", "fashion"):  # the one that comes with the recipes
        path = TEACHER
    if not path.exists():
        console.print(f"training the teacher {name} on {data.name} for {arguments.teacher_epochs} epochs")
        train_teacher(name, data, path, epochs=arguments.teacher_epochs)
    model, size = build(name, data.pixels, data.classes, data.channels)
    load_weights(model, path)
    top1 = Distiller(None, model, "ce", input_size=size).evaluate(data.test)["top1"]
    console.print(f"teacher {name}: top-1 {top1:.2f} % ({path})")
    return model.eval().to(data.train[0].device), size


def run(
    data: ImageData,
    teacher: tuple[nn.Module, int],
    pair: Sequence[str],
    method: str,
    seed: int,
    protocol: dict[str, Any],
    folder: Path,
) -> Row:
    """Trains one student and returns its line of results."""
    torch.manual_seed(seed)  # the same initial student for every method
    student, size = build(pair[1], protocol["student_pixels"], data.classes, data.channels)
    names = method.split("+")
    distiller = Distiller(
        teacher[0],
        student.to(data.train[0].device),
        names if len(names) > 1 else method,
        input_size={"teacher": teacher[1], "student": size},
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
            **{
                key: protocol[key]
                for key in ("epochs", "batch_size", "optimizer", "lr", "warmup_epochs", "mixed_precision")
            },
        )
    return row_of(distiller, result, memory, protocol, dataset=data.name, pair=":".join(pair), method=method, seed=seed)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion", help="fashion, fashion-full, cifar100, hf:NAME or a folder")
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
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    for pair in arguments.pairs:
        if len(pair.split(":")) != 2 or not all(pair.split(":")):
            parser.error(f"--pairs {pair!r} is not TEACHER:STUDENT, such as vit:mobilenetv3_small_050")
    every = ["ce", "kd", *(name for name in list_methods() if name not in ("ce", "kd", "uhkd", "sfkd")), "uhkd", "sfkd"]
    arguments.methods = every if arguments.methods == ["all"] else list(dict.fromkeys(arguments.methods))
    for name in itertools.chain.from_iterable(method.split("+") for method in arguments.methods):
        if name not in every:
            parser.error(f"--methods {name!r} is none of {', '.join(every)}")
    return arguments


if __name__ == "__main__":
    main()
