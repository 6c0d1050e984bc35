"""The runs of `study.py` as tables in Markdown."""

import statistics
from collections.abc import Sequence

from jobs import HOMOGENEOUS, PAIRS, PROTOCOL

from hetkd.training.records import Row

REFERENCE = "sfkd"
HEAD = """# All runs of the study

Every run of [the study on CIFAR-100](results.md), by kind. A cell holds the mean top-1 in percent, its standard
deviation over seeds, the number of seeds in brackets, and the gain over `ce` with the same seeds.

`python recipes/research/study_report.py` writes this page from `docs/research/lines/runs.jsonl`.
"""
KINDS = {
    "final": ("All labels: test images", "test"),
    "scarce": ("Labels for a tenth of the images: test images", "test"),
    "part": ("One part less or more: test images", "test"),
    "trial": ("Every trial: validation images", "validation"),
}


def name_of(row: Row) -> str:
    """Return the method with the options that are not its defaults."""
    options = ", ".join(f"{name}={value!r}" for name, value in row["options"].items())
    return f"{row['method']} ({options})" if options else row["method"]


def pairs_of(rows: Sequence[Row]) -> list[str]:
    """Return the pairs that there are rows for."""
    return [pair for pair in (*PAIRS, HOMOGENEOUS) if any(row["pair"] == pair for row in rows)]


def tables(rows: Sequence[Row]) -> str:
    """Return all tables as Markdown; runs of more or fewer epochs than the protocol's have tables of their own."""
    parts = [HEAD.rstrip()]
    for kind, (title, score) in KINDS.items():
        for epochs in sorted({row["epochs"] for row in rows if row["kind"] == kind}):
            alike = [row for row in rows if row["epochs"] == epochs]
            of_kind = [row for row in alike if row["kind"] == kind]
            length = "" if epochs == PROTOCOL["epochs"] else f" ({epochs} epochs)"
            parts.append(f"## {title}{length}\n\n{_results(of_kind, score)}")
    return "\n\n".join(parts) + "\n"


def _results(rows: Sequence[Row], score: str) -> str:
    """Return a table: a line a method; for each pair mean and spread (seeds), and gain over ce paired by seed.

    Beside them the mean difference from `REFERENCE` with its standard error, over all runs of the same pair and seed.
    """
    pairs = pairs_of(rows)
    heads = [pair.replace(":", " -> ") for pair in pairs]
    lines = [
        f"| method | {' | '.join(heads)} | mean gain | against {REFERENCE} | added parameters |",
        f"|---|{'--:|' * len(pairs)}--:|--:|--:|",
    ]
    for name in dict.fromkeys(name_of(row) for row in rows):
        cells, gains = [], []
        of_method = [row for row in rows if name_of(row) == name]
        for pair in pairs:
            of_pair = {row["seed"]: row for row in of_method if row["pair"] == pair}
            alone = {row["seed"]: row for row in rows if row["pair"] == pair and name_of(row) == "ce"}
            paired = [row[score] - alone[seed][score] for seed, row in of_pair.items() if seed in alone]
            cells.append(f"{_mean_and_spread([row[score] for row in of_pair.values()])} {_signed(paired)}".strip())
            gains.append(paired)
        mean_gain = _signed([statistics.mean(paired) for paired in gains] if all(gains) else []) or "-"
        counts = {row["added_parameters"] for row in of_method}
        added = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
        against = _against(of_method, [row for row in rows if name_of(row) == REFERENCE], score)
        lines.append(f"| {name} | {' | '.join(cells)} | {mean_gain} | {against} | {added} |")
    return "\n".join(lines)


def _against(rows: Sequence[Row], reference: Sequence[Row], score: str) -> str:
    """Return the mean difference of runs of the same pair and seed, its standard error, and how many they are."""
    known = {(row["pair"], row["seed"]): row[score] for row in reference}
    found = [row[score] - known[row["pair"], row["seed"]] for row in rows if (row["pair"], row["seed"]) in known]
    if len(found) < 2 or not any(found):
        return "-"
    return f"{statistics.mean(found):+.2f} ± {statistics.stdev(found) / len(found) ** 0.5:.2f} ({len(found)})"


def _mean_and_spread(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread} ({len(scores)})"


def _signed(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.2f}" if values else ""
