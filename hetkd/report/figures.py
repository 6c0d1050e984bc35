"""The pictures of a report, as SVG that reads on light and dark pages."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hetkd.report.measure import BINS, Answers

INK, COLOURS = "#7d8590", ("#2f81f7", "#d29922", "#3fb950", "#db61a2", "#a371f7", "#f0883e")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hetkd",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 12,
}
_WIDTH = 5.2


def drawn(draw: Callable[..., None], size: tuple[float, float], words: str, *arguments: Any) -> str:
    """Return what a function draws on axes, as an SVG element with a text alternative.

    Args:
        draw: Gets matplotlib's axes, and ``arguments``.
        size: Width and height in inches.
        words: What a person who does not see it should know.
        *arguments: Of ``draw``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), *arguments)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def curves(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Return pictures of loss terms, validation accuracy and learning rate over epochs."""
    terms = [name for name in history[-1] if name.startswith("train/")]
    scores = [name for name in ("top1", "top5", "knn", "agreement") if any(name in record for record in history)]

    def lines(axes: Any, names: Sequence[str], unit: str) -> None:
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            points = [(record["epoch"], record[name]) for record in history if name in record]
            axes.plot(*zip(*points, strict=True), color=colour, marker=".", label=name.removeprefix("train/"))
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if unit == "loss term (log)" and all(record[name] > 0 for record in history for name in names):
            axes.set_yscale("log")
        axes.legend(fontsize=9, ncols=2)

    last = history[-1]
    found = [drawn(lines, (_WIDTH, 3.4), _said("Loss terms", terms, last), terms, "loss term (log)")]
    if scores:
        found.append(drawn(lines, (_WIDTH, 3.0), _said("Validation", scores, last), scores, "%"))
    return [*found, drawn(lines, (_WIDTH, 2.2), _said("Learning rate", ["lr"], last), ["lr"], "learning rate")]


def _said(what: str, names: Sequence[str], last: Mapping[str, float]) -> str:
    values = ", ".join(f"{name.removeprefix('train/')} {last[name]:.4g}" for name in names if name in last)
    return f"{what} over {int(last['epoch'])} epochs; at the end {values}."


def accuracy_of_classes(names: Sequence[str], of_models: Mapping[str, Sequence[float | None]], most: int) -> str:
    """Return bars of each class's accuracy, the worst classes of the first model on top."""
    first = next(iter(of_models.values()))
    known = sorted((value, number) for number, value in enumerate(first) if value is not None)[:most]

    def bars(axes: Any) -> None:
        height = 0.8 / len(of_models)
        for row, (name, values) in enumerate(of_models.items()):
            places = [place + height * (row - (len(of_models) - 1) / 2) for place in range(len(known))]
            axes.barh(places, [values[n] or 0.0 for _, n in known], height, color=COLOURS[row], label=name)
        axes.set_yticks(range(len(known)), [_short(names[n]) for _, n in known])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("top-1, %")
        axes.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    worst = ", ".join(f"{names[n]} {value:.0f} %" for value, n in known[:3])
    return drawn(bars, (_WIDTH, 1.2 + 0.3 * len(known)), f"Accuracy of each class; worst: {worst}.")


def confusions(names: Sequence[str], answers: Answers, most: int) -> str:
    """Return bars of the pairs of classes that are confused most; an empty string where nothing is."""
    pairs = answers.confused(most)
    if not pairs:
        return ""

    def bars(axes: Any) -> None:
        axes.barh(range(len(pairs)), [count for *_, count in pairs], color=COLOURS[1])
        axes.set_yticks(range(len(pairs)), [f"{_short(names[a])} taken for {_short(names[b])}" for a, b, _ in pairs])
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.xaxis.get_major_locator().set_params(integer=True)

    a, b, count = pairs[0]
    words = f"Confused most: {names[a]} taken for {names[b]}, {count} times."
    return drawn(bars, (_WIDTH, 1.0 + 0.3 * len(pairs)), words)


def reliability(of_models: Mapping[str, Answers]) -> str:
    """Return accuracy over confidence."""

    def lines(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":")
        for (name, answers), colour in zip(of_models.items(), COLOURS, strict=False):
            points = [(100 * c, 100 * a) for c, a, _ in answers.reliability()]
            label = f"{name}, error {answers.calibration_error:.1f} %"
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
        axes.set_xlabel(f"mean confidence of {BINS} bins, %")
        axes.set_ylabel("top-1, %")
        axes.legend(fontsize=9)

    errors = ", ".join(f"{name} {x.calibration_error:.1f} %" for name, x in of_models.items())
    return drawn(lines, (_WIDTH, 3.6), f"Reliability; expected calibration error: {errors}.")


def likeness(rows: Sequence[str], columns: Sequence[str], table: Sequence[Sequence[float]], title: str) -> str:
    """Return a CKA table as a heat map; rows are the teacher's stages, columns the student's."""

    def heat(axes: Any) -> None:
        axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
        axes.set_title(title)
        for r, row in enumerate(table):
            for c, value in enumerate(row):
                colour = "white" if value < 0.6 else "black"
                axes.text(c, r, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)

    mean = sum(map(sum, table)) / (len(rows) * len(columns))
    size = (1.6 + 0.9 * len(columns), 1.6 + 0.42 * len(rows))
    return drawn(heat, size, f"CKA of the teacher's stages with the student's, {title}: {mean:.2f} on the mean.")


def energies(of_models: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the shares of energy of sub-bands, a bar a stage."""
    rows = [(f"{model}: {_short(stage)}", shares) for model, x in of_models.items() for stage, shares in x.items()]

    def bars(axes: Any) -> None:
        left = [0.0] * len(rows)
        for band, (name, colour) in enumerate(zip(("low (LL)", "middle", "high"), COLOURS, strict=False)):
            widths = [100 * shares[band] for _, shares in rows]
            axes.barh(range(len(rows)), widths, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel("energy, %")
        axes.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    low = ", ".join(f"{name} {100 * shares[0]:.0f} %" for name, shares in rows)
    return drawn(bars, (_WIDTH, 1.2 + 0.27 * len(rows)), f"Share of energy in the lowest sub-band: {low}.")


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
