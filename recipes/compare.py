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
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fashion import TEACHER
from image_data import ImageData, augmentation, load_images
from rich.console import Console
from torch import nn
from train_teacher import teacher_path, train_teacher
from zoo import build

from hetkd import Distiller, list_methods
from hetkd.files import write_atomically, write_json
from hetkd.models import load_weights

console = Console(highlight=False, soft_wrap=True)
Row = dict[str, Any]
GRAY, BLUE = "#8a8f98", "#2f6fde"


def main() -> None:
    """Runs what is not there yet, and writes table and picture."""
    arguments = parse_arguments()
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
    table = make_table(rows, protocol)
    write_atomically(folder / "table.md", lambda path: _write(path, table))
    console.print(f"\n{table}")
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
    return {
        "dataset": data.name,
        "pair": ":".join(pair),
        "method": method,
        "seed": seed,
        "top1": result.history[-1]["top1"],
        "epochs": protocol["epochs"],
        "seconds": sum(record["seconds"] for record in result.history),
        "images_per_second": statistics.median(record["images_per_second"] for record in result.history),
        "peak_memory_mb": memory.peak_mb,
        "added_parameters": distiller.plan.added_parameters,
        "plan": distiller.plan.title,
        "settings": {"method": distiller.method.settings(), **protocol},
        "curve": [record["top1"] for record in result.history],
        "versions": {name: version(name) for name in ("hetkd", "torch", "timm", "accelerate")},
        "git_revision": git_revision(),
        "machine": machine(),
    }


class PeakMemory:
    """The most memory while a context lasts: on a GPU what PyTorch allocates, else what the process holds."""

    def __enter__(self) -> "PeakMemory":
        self.peak_mb = 0.0
        self._stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak_mb = max(self.peak_mb, pages * 4096 / 1e6)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if torch.cuda.is_available():
            self.peak_mb = torch.cuda.max_memory_allocated() / 1e6
        else:
            self._thread.join()


def read_rows(path: Path) -> list[Row]:
    """Returns the runs that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes all runs, one JSON object a line; the file is whole at every moment."""
    write_atomically(path, lambda temporary: _write(temporary, "".join(json.dumps(row) + "\n" for row in rows)))


def make_table(rows: Sequence[Row], protocol: dict[str, Any]) -> str:
    """Returns a Markdown table a pair, and one of the mean over pairs."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None)
    parts = [
        f"# Test top-1 by method\n\n{facts}. Spread: standard deviation over seeds. Gain: over `ce`, paired by seed.\n"
    ]
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    for pair in pairs:
        of_pair = [row for row in rows if row["pair"] == pair]
        parts.append(f"## {pair.replace(':', ' -> ')}\n\n{_table(of_pair)}\n")
    if len(pairs) > 1:
        parts.append(f"## Mean over {len(pairs)} pairs\n\n{_mean_table(rows, pairs)}\n")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| method | seeds | top-1, % | spread | gain | added parameters | images/s | peak MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        scores = [row["top1"] for row in of_method]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-"
        gains = paired_gains(rows, method)
        gain = f"{statistics.mean(gains):+.2f}" if gains and method != "ce" else "-"
        speed = statistics.median(row["images_per_second"] for row in of_method)
        memory = max(row["peak_memory_mb"] for row in of_method)
        lines.append(
            f"| {method} | {len(scores)} | {statistics.mean(scores):.2f} | {spread} | {gain} "
            f"| {of_method[0]['added_parameters']:,} | {speed:,.0f} | {memory:,.0f} |"
        )
    return "\n".join(lines)


def _mean_table(rows: Sequence[Row], pairs: Sequence[str]) -> str:
    lines = ["| method | top-1, % | gain |", "|---|--:|--:|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_pairs = [[row for row in rows if row["pair"] == pair] for pair in pairs]
        scores = [[row["top1"] for row in of_pair if row["method"] == method] for of_pair in of_pairs]
        if not all(scores):
            continue
        gains = [paired_gains(of_pair, method) for of_pair in of_pairs]
        gain = f"{statistics.mean(map(statistics.mean, gains)):+.2f}" if all(gains) and method != "ce" else "-"
        lines.append(f"| {method} | {statistics.mean(map(statistics.mean, scores)):.2f} | {gain} |")
    return "\n".join(lines)


def paired_gains(rows: Sequence[Row], method: str) -> list[float]:
    """Returns the gains of a method over `ce` on one pair, for each seed that has both."""
    alone = {row["seed"]: row["top1"] for row in rows if row["method"] == "ce"}
    return [row["top1"] - alone[row["seed"]] for row in rows if row["method"] == method and row["seed"] in alone]


def draw_gains(rows: Sequence[Row], path: Path) -> None:
    """Draws the gain over `ce` of each method: a dot a seed, a bar at their mean, a panel a pair."""
    try:
        import matplotlib
    except ImportError:
        console.print("No picture: pip install 'hetkd[plots]' for it.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    of_pairs = {pair: [row for row in rows if row["pair"] == pair] for pair in pairs}
    methods = [
        name
        for name in dict.fromkeys(row["method"] for row in rows)
        if any(paired_gains(r, name) for r in of_pairs.values()) and name != "ce"
    ]
    if not methods:
        console.print("No picture: gains need the method ce and another one.")
        return
    figure, panels = pyplot.subplots(
        1, len(pairs), squeeze=False, sharey=True, figsize=(2.2 + 3.6 * len(pairs), 1.6 + 0.3 * len(methods))
    )
    for panel, (pair, of_pair) in zip(panels[0], of_pairs.items(), strict=True):
        panel.axvline(0, color=GRAY, linewidth=1)
        for height, method in enumerate(reversed(methods)):
            gains = paired_gains(of_pair, method)
            panel.plot(gains, [height] * len(gains), "o", color=BLUE, alpha=0.45, markersize=5)
            if gains:
                panel.plot([statistics.mean(gains)] * 2, [height - 0.3, height + 0.3], color=BLUE, linewidth=2.5)
        panel.set_yticks(range(len(methods)), list(reversed(methods)))
        panel.set_title(pair.replace(":", " → "), fontsize=11)
        panel.set_xlabel("gain over ce, points of top-1")
        panel.grid(axis="x", color="#e4e6ea")
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    console.print(f"picture: {path}")


def git_revision() -> str | None:
    """Returns the commit of the recipes, marked if there are changes; ``None`` outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Returns what the runs were made on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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
