"""Tables and pictures of the runs of `study.py`, into docs/research/.

python recipes/research/study_report.py                 # tables.md, lines/curves.png
python recipes/research/study_report.py --features      # also bands.png and cka.png, from the saved students

Pictures need matplotlib: `pip install "hetkd[plots]"`.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import CLASSES, PAIRS, PIXELS, PROTOCOL
from study import Split, load_split, load_teacher, student_path
from study_tables import name_of, pairs_of, tables
from torch import Tensor, nn

from hetkd import Distiller
from hetkd.features.grid import to_grid
from hetkd.features.pairing import choose_stages
from hetkd.models import build_small, load_weights
from hetkd.spectral import dwt2
from hetkd.training.agreement import linear_cka
from hetkd.training.records import Row, read_rows

GRAY, BLUE = "#8a8f98", "#2f6fde"
ORANGE, GREEN = "#e0862a", "#1c9a5b"
COLOURS = {"ce": GRAY, "kd": "#b23a8e", "uhkd": ORANGE, "sfkd": BLUE}
SHOWN = ("ce", "kd", "uhkd", "sfkd")
LEVELS = 2


def main(words: list[str] | None = None) -> None:
    """Write what there are runs for; ``words`` stand for the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("docs/research/lines/runs.jsonl"), metavar="FILE")
    parser.add_argument("--tables", type=Path, default=Path("docs/research/tables.md"), metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("docs/research/lines"), metavar="DIR")
    parser.add_argument("--teachers", type=Path, default=Path("runs/teachers"), metavar="DIR")
    parser.add_argument("--students", type=Path, default=Path("runs/students"), metavar="DIR")
    parser.add_argument("--features", action="store_true", help="also cka.png and bands.png")
    arguments = parser.parse_args(words)
    rows = read_rows(arguments.runs)
    arguments.tables.write_text(tables(rows), encoding="utf-8")
    final = [row for row in rows if row["kind"] == "final" and row["epochs"] == PROTOCOL["epochs"]]
    if final:
        draw_curves(final, arguments.output / "curves.png")
    if arguments.features:
        draw_features(arguments.students, arguments.teachers, arguments.output)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw validation accuracy over epochs, the mean over the seeds, a panel a pair that our methods were run on."""
    pairs = pairs_of([row for row in rows if row["method"] == SHOWN[-1]])
    figure, panels = _panels(len(pairs))
    others = _best_others(rows)
    for panel, pair in zip(panels, pairs, strict=True):
        for method in (*SHOWN, *others):
            curves = [row["curve"] for row in rows if row["pair"] == pair and name_of(row) == method]
            if not curves:
                continue
            epochs = [epoch for epoch, _ in curves[0]]
            scores = zip(*([score for _, score in curve] for curve in curves), strict=True)
            means = [statistics.mean(of_epoch) for of_epoch in scores]
            colour = COLOURS.get(method, GREEN)
            label = method if "(" not in method else f"{method.partition(' ')[0]}, searched"
            panel.plot(epochs, means, "-o", color=colour, markersize=4, label=label)
        panel.set_title(pair.replace(":", " → "), fontsize=11)
        panel.set_xlabel("epoch")
        panel.set_ylabel("validation top-1, %")
        panel.legend(frameon=False)
    _save(figure, path)


def _best_others(rows: Sequence[Row]) -> list[str]:
    """Return the baseline with the best mean, beside those that are shown anyway."""
    others = dict.fromkeys(name_of(row) for row in rows if row["method"] not in SHOWN)
    means = {name: statistics.mean(row["test"] for row in rows if name_of(row) == name) for name in others}
    return sorted(means, key=lambda name: -means[name])[:1]


def draw_features(students: Path, teachers: Path, output: Path) -> None:
    """Draw what features look like on validation images: CKA of all stages, and energies of sub-bands."""
    split, similarities, energies = load_split(), {}, {}
    for pair in PAIRS:
        if not all(student_path(students, pair, method).exists() for method in SHOWN):
            print(f"{pair}: {students} has not the students of {', '.join(SHOWN)}, so its features are not drawn")
            continue
        teacher_name, student_name = pair.split(":")
        maps = {"teacher": stage_maps(*load_teacher(teacher_name, teachers), split)}
        for what in ("untrained", *SHOWN):
            torch.manual_seed(0)
            student, size = build_small(student_name, PIXELS[student_name], CLASSES, 3)
            if what != "untrained":
                load_weights(student, student_path(students, pair, what))
            maps[what] = stage_maps(student, size, split)
        similarities[pair] = {
            name: [[linear_cka(s.mean((2, 3)), t.mean((2, 3))) for t in maps["teacher"]] for s in of_student]
            for name, of_student in maps.items()
            if name != "teacher"
        }
        energies[pair] = {name: band_energies(of_model[2]) for name, of_model in maps.items()}
    draw_cka(similarities, output / "cka.png")
    draw_bands(energies, output / "bands.png")


@torch.no_grad()
def stage_maps(model: nn.Module, size: int, split: Split) -> list[Tensor]:
    """Return the maps ``[N, C, h, w]`` of a model's four stages for every fifth validation image."""
    tap = Distiller(None, model, "ce", input_size=size).eval().taps["student"]
    tap.select([stage.name for stage in choose_stages(tap.listed)])
    parts = [tap.run(images).maps for images in split.validation[0][::5].split(250)]
    return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def band_energies(maps: Tensor) -> list[float]:
    """Return the shares of energy in the low band, and in the details from coarse to fine, of centred 4 x 4 maps."""
    bands = dwt2(to_grid(maps - maps.mean(0), (4, 4)), "haar", LEVELS)
    parts = [float(x.square().sum()) for x in (bands.low, *reversed(bands.details))]
    return [part / sum(parts) for part in parts]


def draw_cka(similarities: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw a row of heat maps a pair: stages of the student against stages of the teacher."""
    columns = len(next(iter(similarities.values())))
    figure, panels = _panels(columns * len(similarities), per_row=columns, width=2.6, height=2.6)
    for number, (pair, of_pair) in enumerate(similarities.items()):
        row = panels[number * columns :][:columns]
        for panel, (name, values) in zip(row, of_pair.items(), strict=True):
            panel.grid(visible=False)
            panel.imshow(values, cmap="Blues", vmin=0, vmax=1, origin="lower")
            for (i, j), value in ((place, values[place[0]][place[1]]) for place in _places(values)):
                colour = "white" if value > 0.6 else "#333333"
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
            panel.set_title(f"{pair.split(':')[1]}: {name}", fontsize=10)
            panel.set_xlabel(f"stage of {pair.split(':')[0]}")
            panel.set_xticks(range(len(values[0])), range(1, len(values[0]) + 1))
            panel.set_yticks(range(len(values)), range(1, len(values) + 1))
        row[0].set_ylabel("stage of the student")
    _save(figure, path)


def _places(values: Sequence[Sequence[float]]) -> Iterable[tuple[int, int]]:
    return ((i, j) for i in range(len(values)) for j in range(len(values[0])))


def draw_bands(energies: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw bars of the shares of energy by sub-band, of the third stage of teacher and students, a panel a pair."""
    figure, panels = _panels(len(energies))
    names = ["low band", *(f"details, level {level}" for level in range(LEVELS, 0, -1))]
    for panel, (pair, of_pair) in zip(panels, energies.items(), strict=True):
        left = [0.0] * len(of_pair)
        for number, (name, colour) in enumerate(zip(names, (BLUE, ORANGE, GRAY), strict=True)):
            shares = [values[number] for values in of_pair.values()]
            panel.barh(range(len(of_pair)), shares, left=left, color=colour, label=name)
            left = [x + share for x, share in zip(left, shares, strict=True)]
        panel.set_yticks(range(len(of_pair)), list(of_pair))
        panel.invert_yaxis()
        panel.set_title(pair.replace(":", " → "), fontsize=11)
        panel.set_xlabel("share of energy, third stage, 4 x 4")
        panel.grid(visible=False)
    panels[0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3, fontsize=9)
    _save(figure, path)


def _panels(count: int, per_row: int = 3, width: float = 4.6, height: float = 3.8) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, rows = min(count, per_row), math.ceil(count / per_row)
    figure, places = pyplot.subplots(rows, columns, squeeze=False, figsize=(width * columns, height * rows))
    panels = list(places.flat)
    for panel in panels[count:]:
        panel.axis("off")
    for panel in panels[:count]:
        panel.grid(color="#e4e6ea")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, panels[:count]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
