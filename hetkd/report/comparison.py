"""Compares methods by their runs: a Markdown table, a picture of gains, and a page of both with curves and costs."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hetkd.report.figures import COLOURS, INK, drawn
from hetkd.report.template import render
from hetkd.training.records import Row
from hetkd.utils.files import write_text

COLUMNS = ("method", "seeds", "top-1, %", "spread", "gain", "added parameters", "images/s", "peak MB")
_BLUE = "#2f6fde"
_IN_CURVES, _PANEL = 6, 3.6

Failures = Mapping[tuple[str, str], str]
"""Why a pair and method have no run."""


def write_comparison(rows: Sequence[Row], protocol: Mapping[str, Any], failures: Failures, path: Path) -> Path:
    """Write one page of all runs: tables, gains, curves and costs by pair, what failed, and the protocol."""
    of_pairs = by_pair(rows)
    page = {
        "title": f"{len({row['method'] for row in rows})} methods on {protocol['dataset']}",
        "subtitle": f"{len(rows)} runs: {protocol['train_images']:,} training images, {protocol['epochs']} epochs, "
        f"top-1 of {protocol['test_images']:,} test images",
        "columns": COLUMNS,
        "pairs": [
            {"name": arrow(pair), "rows": method_rows(of_pair), "pictures": _pictures(of_pair)}
            for pair, of_pair in of_pairs.items()
        ],
        "mean": mean_rows(of_pairs) if len(of_pairs) > 1 else [],
        "failures": [(arrow(pair), method, why) for (pair, method), why in failures.items()],
        "settings": [(name.replace("_", " "), value) for name, value in protocol.items() if value is not None],
        "machines": ", ".join(sorted({row["machine"] for row in rows})),
        "version": version("hetkd"),
        "date": date.today().isoformat(),
    }
    write_text(path, render("comparison.html", page))
    return path


def write_table(rows: Sequence[Row], protocol: Mapping[str, Any], failures: Failures, path: Path) -> str:
    """Write `make_table` to a file, and return it."""
    table = make_table(rows, protocol, failures)
    write_text(path, table)
    return table


def make_table(rows: Sequence[Row], protocol: Mapping[str, Any], failures: Failures | None = None) -> str:
    """Return a Markdown table a pair, one of the mean over pairs, and what failed."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None)
    parts = [
        f"# Test top-1 by method\n\n{facts}. Spread: standard deviation over seeds. Gain: over `ce`, paired by seed.\n"
    ]
    of_pairs = by_pair(rows)
    for pair, of_pair in of_pairs.items():
        parts.append(f"## {arrow(pair)}\n\n{_markdown(COLUMNS, method_rows(of_pair))}\n")
    if len(of_pairs) > 1:
        table = _markdown(("method", "top-1, %", "gain"), mean_rows(of_pairs))
        parts.append(f"## Mean over {len(of_pairs)} pairs\n\n{table}\n")
    if failures:
        lines = [f"- {arrow(pair)}, `{method}`: {why}" for (pair, method), why in failures.items()]
        parts.append("## Failed\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, f"|---|{'--:|' * (len(columns) - 1)}", *body])


def by_pair(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the runs of each pair."""
    return {pair: [row for row in rows if row["pair"] == pair] for pair in dict.fromkeys(row["pair"] for row in rows)}


def arrow(pair: str) -> str:
    """Return a pair as people read it."""
    return pair.replace(":", " -> ")


def method_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of `COLUMNS`, a row for each method of one pair."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        scores = [row["top1"] for row in of_method]
        gains = paired_gains(rows, method)
        found.append(
            [
                method,
                f"{len(scores)}",
                f"{statistics.mean(scores):.2f}",
                f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-",
                f"{statistics.mean(gains):+.2f}" if gains and method != "ce" else "-",
                f"{of_method[0]['added_parameters']:,}",
                f"{statistics.median(row['images_per_second'] for row in of_method):,.0f}",
                f"{max(row['peak_memory_mb'] for row in of_method):,.0f}",
            ]
        )
    return found


def mean_rows(of_pairs: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """Return method, mean top-1 and mean gain over pairs, of the methods that every pair has."""
    found = []
    for method in dict.fromkeys(row["method"] for rows in of_pairs.values() for row in rows):
        scores = [[row["top1"] for row in rows if row["method"] == method] for rows in of_pairs.values()]
        if not all(scores):
            continue
        gains = [paired_gains(rows, method) for rows in of_pairs.values()]
        gain = f"{statistics.mean(map(statistics.mean, gains)):+.2f}" if all(gains) and method != "ce" else "-"
        found.append([method, f"{statistics.mean(map(statistics.mean, scores)):.2f}", gain])
    return found


def paired_gains(rows: Sequence[Row], method: str) -> list[float]:
    """Return the gains of a method over `ce` on one pair, for each seed that has both."""
    alone = {row["seed"]: row["top1"] for row in rows if row["method"] == "ce"}
    return [row["top1"] - alone[row["seed"]] for row in rows if row["method"] == method and row["seed"] in alone]


def draw_gains(rows: Sequence[Row], path: Path) -> None:
    """Draw the gain over `ce` of each method as a PNG: a dot a seed, a bar at their mean, a panel a pair."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: pip install 'hetkd[plots]' for it.")
        return
    of_pairs = by_pair(rows)
    methods = _methods_with_gains(rows)
    if not methods:
        print("No picture: gains need the method ce and another one.")
        return
    size = (2.2 + _PANEL * len(of_pairs), 1.6 + 0.3 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(of_pairs), squeeze=False, sharex=True, sharey=True)
    for panel, (pair, of_pair) in zip(panels[0], of_pairs.items(), strict=True):
        _draw_gains(panel, of_pair, methods)
        panel.set_title(arrow(pair), fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def _methods_with_gains(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != "ce")
    return [name for name in names if any(paired_gains(of_pair, name) for of_pair in by_pair(rows).values())]


def _draw_gains(axes: Any, rows: Sequence[Row], methods: Sequence[str]) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    for height, method in enumerate(methods):
        gains = paired_gains(rows, method)
        axes.plot(gains, [height] * len(gains), "o", color=_BLUE, alpha=0.45, markersize=5)
        if gains:
            axes.plot([statistics.mean(gains)] * 2, [height - 0.3, height + 0.3], color=_BLUE, linewidth=2.5)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("gain over ce, points of top-1")
    axes.grid(axis="x", color=INK, alpha=0.25)
    axes.set_axisbelow(True)


def _pictures(rows: Sequence[Row]) -> list[str]:
    """Return gains, curves and costs of one pair, as SVG."""
    means = {m: statistics.mean(r["top1"] for r in rows if r["method"] == m) for m in {r["method"] for r in rows}}
    best = sorted(means, key=lambda method: -means[method])
    said = ", ".join(f"{method} {means[method]:.2f} %" for method in best)
    found, methods = [], _methods_with_gains(rows)
    if methods:
        size = (_PANEL + 1.6, 1.2 + 0.3 * len(methods))
        found.append(drawn(_draw_gains, size, f"Gains over ce. Top-1: {said}.", rows, methods))
    others = best[_IN_CURVES - 1 :]
    shown = [*best[: _IN_CURVES - 1], *(["ce"] if "ce" in others else others[:1])]
    curves = drawn(_draw_curves, (_PANEL + 1.6, 3.2), f"Top-1 by epoch of {', '.join(shown)}.", rows, shown)
    costs = drawn(_draw_costs, (_PANEL + 1.6, 3.2), "Top-1 by the seconds of a run.", rows, means)
    return [*found, curves, costs]


def _draw_curves(axes: Any, rows: Sequence[Row], methods: Sequence[str]) -> None:
    for method, colour in zip(methods, COLOURS, strict=False):
        curves = [row["curve"] for row in rows if row["method"] == method]
        mean = [statistics.mean(values) for values in zip(*curves, strict=False)]
        axes.plot(range(1, len(mean) + 1), mean, color=colour, marker=".", label=method)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=9)


def _draw_costs(axes: Any, rows: Sequence[Row], means: Mapping[str, float]) -> None:
    for method, top1 in means.items():
        seconds = statistics.median(row["seconds"] for row in rows if row["method"] == method)
        axes.plot(seconds, top1, "o", color=_BLUE)
        axes.annotate(method, (seconds, top1), xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("seconds of a run")
    axes.set_ylabel("top-1, %")
    axes.margins(0.15)
