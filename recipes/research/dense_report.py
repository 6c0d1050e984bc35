"""Prints the tables of `docs/research/segmentation.md` from the lines of `dense.py`.

PYTHONPATH=recipes/bench python recipes/research/dense_report.py docs/research/lines/dense.jsonl
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from dense_data import CLASSES, EDGES
from study_tables import name_of

from hetkd.training.records import Row, read_rows


def main(words: list[str] | None = None) -> None:
    """Print a table of all methods, of distances to edges, and of classes for each pair and number of epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, metavar="FILE")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    arguments = parser.parse_args(words)
    rows = read_rows(arguments.lines)
    students = [row for row in rows if row["step"] == "student" and row["epochs_done"] == row["epochs"]]
    for row in {row["teacher"]: row for row in rows if row["step"] == "teacher"}.values():
        print(f"teacher {row['teacher']}: mIoU {row['val']['miou']:.2f} (val), {row['test']['miou']:.2f} (test)\n")
    for pair, epochs in dict.fromkeys((row["pair"], row["epochs"]) for row in students):
        of_pair = [row for row in students if (row["pair"], row["epochs"]) == (pair, epochs)]
        print(f"## {pair.replace(':', ' -> ')}, {epochs} epochs\n\n{table(of_pair, arguments.split)}\n")


def table(rows: Sequence[Row], split: str) -> str:
    """Return a Markdown table, the best method by its validation images first."""
    columns = ["seeds", "val mIoU", f"{split} mIoU", "pixel accuracy", *edge_names(), *CLASSES, "seconds"]
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    for name, of_method in sorted(groups.items(), key=lambda item: -mean(item[1], lambda row: row["val"]["miou"])):
        cells = [f"{len(of_method)}", spread(of_method, lambda row: row["val"]["miou"])]
        cells += [spread(of_method, lambda row: row[split]["miou"])]
        cells += [f"{mean(of_method, lambda row: row[split]['pixel_accuracy']):.2f}"]
        cells += [f"{mean(of_method, lambda row, n=n: row[split]['edges'][n]):.2f}" for n in range(len(EDGES) + 1)]
        cells += [f"{mean(of_method, lambda row, c=c: row[split].get(f'iou/{c}', 0.0)):.1f}" for c in CLASSES]
        cells += [f"{mean(of_method, lambda row: row['seconds']):.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def edge_names() -> list[str]:
    """Return what the bands of distances to the next edge are called."""
    return [f"up to {pixels} px" for pixels in EDGES] + ["farther"]


def mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """Return the mean over runs."""
    return statistics.mean(map(value, rows))


def spread(rows: Sequence[Row], value: Callable[[Row], float]) -> str:
    """Return mean and standard deviation over runs."""
    values = [value(row) for row in rows]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
