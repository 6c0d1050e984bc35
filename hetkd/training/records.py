"""Records of runs, for comparisons: one JSON object a line, with settings and costs; tables and pictures of them."""

import json
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from hetkd.distillation import Distillation
from hetkd.training.checkpoint import SETTINGS
from hetkd.training.run import FitResult
from hetkd.utils.files import write_text

Row = dict[str, Any]
_GRAY, _BLUE = "#8a8f98", "#2f6fde"


def row_of(distillation: Distillation, result: FitResult, memory: "PeakMemory", about: Mapping[str, Any]) -> Row:
    """Return the line of one run: what was run (``about`` and all settings), its results, costs and machine."""
    history = result.history
    settings = {} if result.output_dir is None else json.loads((result.output_dir / SETTINGS).read_text())
    return {
        **about,
        "top1": history[-1]["top1"],
        "epochs": len(history),
        "seconds": sum(record["seconds"] for record in history),
        "images_per_second": statistics.median(record["images_per_second"] for record in history),
        "peak_memory_mb": memory.peak_mb,
        "added_parameters": distillation.plan.added_parameters,
        "settings": settings,
        "curve": [record["top1"] for record in history],
        "versions": {name: version(name) for name in ("hetkd", "torch", "timm", "accelerate")},
        "git_revision": git_revision(),
        "machine": machine(),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the runs that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all runs, one JSON object a line; the file is whole at every moment."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


class PeakMemory:
    """The most memory while a context lasts: on a GPU what PyTorch allocates, else what the whole process holds."""

    def __enter__(self) -> Self:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        from psutil import Process

        process = Process()
        while True:
            self.peak_mb = max(self.peak_mb, process.memory_info().rss / 1e6)
            if self._stop.wait(0.05):
                return

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if torch.cuda.is_available():
            self.peak_mb = torch.cuda.max_memory_allocated() / 1e6
        else:
            self._thread.join()


def git_revision() -> str | None:
    """Return the commit of the script that runs, marked if there are changes; ``None`` outside a repository."""
    folder = str(Path(sys.argv[0] or ".").resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Return the GPU's name, or processor and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def write_table(
    rows: Sequence[Row], protocol: Mapping[str, Any], failures: Mapping[tuple[str, str], str], path: Path
) -> str:
    """Write `make_table` to a file, and returns it."""
    table = make_table(rows, protocol, failures)
    write_text(path, table)
    return table


def make_table(
    rows: Sequence[Row], protocol: Mapping[str, Any], failures: Mapping[tuple[str, str], str] | None = None
) -> str:
    """Return a Markdown table a pair, one of the mean over pairs, and what failed (pair and method: why)."""
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
    if failures:
        lines = [f"- {pair.replace(':', ' -> ')}, `{method}`: {why}" for (pair, method), why in failures.items()]
        parts.append("## Failed\n\n" + "\n".join(lines) + "\n")
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
    """Return the gains of a method over `ce` on one pair, for each seed that has both."""
    alone = {row["seed"]: row["top1"] for row in rows if row["method"] == "ce"}
    return [row["top1"] - alone[row["seed"]] for row in rows if row["method"] == method and row["seed"] in alone]


def draw_gains(rows: Sequence[Row], path: Path) -> None:
    """Draw the gain over `ce` of each method: a dot a seed, a bar at their mean, a panel a pair."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: pip install 'hetkd[plots]' for it.")
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
        print("No picture: gains need the method ce and another one.")
        return
    figure, panels = pyplot.subplots(
        1,
        len(pairs),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2.2 + 3.6 * len(pairs), 1.6 + 0.3 * len(methods)),
    )
    for panel, (pair, of_pair) in zip(panels[0], of_pairs.items(), strict=True):
        panel.axvline(0, color=_GRAY, linewidth=1)
        for height, method in enumerate(reversed(methods)):
            gains = paired_gains(of_pair, method)
            panel.plot(gains, [height] * len(gains), "o", color=_BLUE, alpha=0.45, markersize=5)
            if gains:
                panel.plot([statistics.mean(gains)] * 2, [height - 0.3, height + 0.3], color=_BLUE, linewidth=2.5)
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
    print(f"picture: {path}")
