"""What hetkd costs, as ratios measured side by side in one run, on the CPU or on CUDA where there is one.

    python recipes/bench/bench.py                         # training steps of all methods against the floor, five pairs
    python recipes/bench/bench.py --small --json FILE     # two pairs, the main methods: within 5 minutes on two cores
    python recipes/bench/bench.py spectral                # transforms against torch.fft and ptwt; growth with sizes
    python recipes/bench/bench.py recorded                # steps of a small student from recorded features, over `ce`
    python recipes/bench/bench.py tap                     # the tap against a plain forward
    python recipes/bench/bench.py loop                    # `fit` on a small data set against the bare step
    python recipes/bench/bench.py cache                   # an epoch from the teacher cache against plain training
    python recipes/bench/bench.py import                  # importing hetkd against importing torch

`steps`, the default: the floor of a step is the forward of the teacher, and forward, backward and update of the
student, on images that are ready for both, in the same precision and memory format. Every contender takes turns with
it: each method of hetkd, timm's distillation tasks, and torchdistill's KD (`pip install ".[bench]"`). `ratio` is the
median over the rounds of a step's time over the mean of the floors before and after it, `ratio_interval` where that
median lies with 95 % confidence, `ratio_quartiles` those of the single rounds; `memory_ratio` compares peaks of
memory, with weights and optimizer; `operations` is how many of PyTorch's operations a step runs, views aside, which is
what a GPU's launches go by; the phases say where the milliseconds go. On the CPU the allocator
should keep freed memory, for otherwise each contender pays for page faults by luck: set `MALLOC_MMAP_MAX_=0` and
`MALLOC_TRIM_THRESHOLD_=100000000000` (docs/research/performance.md).

`tap`: plain and tapped forward passes of one model take turns; the figures are medians of their times,
the quartiles of the ratio of neighbours, and the ratio of the peaks of memory.

`loop`: images a second of `fit`, which draws, augments and accounts for batches of a data set that stays on the
device as uint8, against the same step (forward of both models, loss, backward, update) on one batch again and again.

`cache`: seconds of an epoch of `fit` with the teacher live and from the cache, against the student alone (`ce`), on the
same images; the three take turns, and the figures are medians.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from parts import bench_growth, bench_import, bench_transforms
from rich.console import Console
from rich.table import Table
from runs import MODELS, bench_cache, bench_loop, bench_tap
from small_student import bench_small_student
from steps import METHODS, PAIRS, PEERS, SMALL, SMALL_PAIRS, bench_pair, has_torchdistill

BATCH, REPEATS = 8, 20
CUDA_BATCH = 64  # with less, a GPU waits for the launches of its kernels
SMALL_REPEATS, STEPS_REPEATS = 6, 10
SMALL_STEPS_REPEATS, SMALL_SECONDS = 40, 80  # as many rounds as time allows
console = Console(highlight=False, width=160)


def main() -> None:
    """Measure, print tables, and write the rows."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for title, part in measure(arguments, device):
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print_table(f"{title}, {device}{threads}, batch {arguments.batch_size}", part)
        rows += part
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2))


def measure(arguments: argparse.Namespace, device: torch.device) -> Any:
    """Yield titles and rows, as they are measured."""
    if arguments.what == "steps":
        if "torchdistill kd" in arguments.methods and not has_torchdistill():
            console.print("torchdistill is not installed (pip install '.[bench]') and left out.")
        seconds = SMALL_SECONDS if arguments.small else float("inf")
        for pair in arguments.pairs:
            yield pair, bench_pair(pair, arguments.methods, arguments.batch_size, arguments.repeats, device, seconds)
    elif arguments.what == "spectral":
        yield "transforms", bench_transforms(arguments.batch_size, arguments.repeats, device)
        yield "growth", bench_growth(arguments.repeats, device)
    elif arguments.what == "recorded":
        yield "recorded", bench_small_student(arguments.repeats, device)
    elif arguments.what == "tap":
        yield "tap", [bench_tap(name, device, arguments) for name in arguments.models]
    elif arguments.what == "cache":
        yield "cache", [bench_cache(method, device, arguments) for method in ("kd", "uhkd", "sfkd")]
    elif arguments.what == "loop":
        yield "loop", [bench_loop(method, device, arguments) for method in ("ce", "kd", "sfkd")]
    else:
        yield "import", bench_import(arguments.repeats)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows; the phases of steps as a table of their own."""
    table = Table(title=title)
    columns = [column for column in rows[0] if column not in ("pair", "phases")]
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    console.print(table)
    with_phases = {row["method"]: row["phases"] for row in rows if row.get("phases")}
    if with_phases:
        print_table("milliseconds", [{"method": name, **phases} for name, phases in with_phases.items()])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["steps", "spectral", "recorded", "tap", "loop", "cache", "import"]
    parser.add_argument("what", nargs="?", choices=kinds, default="steps")
    parser.add_argument(
        "--small", action="store_true", help=f"ends within 5 minutes on two cores: steps take {SMALL_SECONDS} s a pair"
    )
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), metavar="PAIR", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PEERS], metavar="NAME")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="for tap: models that take 224 px")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(words)
    if arguments.repeats is not None and arguments.repeats < 2:
        parser.error("--repeats must be at least 2, for a spread.")
    small = arguments.small
    arguments.pairs = arguments.pairs or (SMALL_PAIRS if small else list(PAIRS))
    arguments.methods = arguments.methods or (SMALL if small else [*METHODS, *PEERS])
    arguments.batch_size = arguments.batch_size or (CUDA_BATCH if torch.cuda.is_available() else BATCH)
    usual = STEPS_REPEATS if arguments.what == "steps" else REPEATS
    few = SMALL_STEPS_REPEATS if arguments.what == "steps" else SMALL_REPEATS
    arguments.repeats = arguments.repeats or (few if small else usual)
    return arguments


if __name__ == "__main__":
    main()
