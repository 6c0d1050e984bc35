"""SFKD and UHKD against the baselines on real pairs, at a scale that two CPU cores can do: `docs/research/results.md`.

In `recipes/research`:

    python study.py record                                        # the teachers' features, once
    python study.py try --methods kd sfkd:feature_weight=40       # trials on the validation images
    python study.py final --seeds 3                               # the final table, on the test images
    python study.py searched --seeds 3                            # the same, baselines with the best settings found
    python study.py final --pairs mixer:resnet_slim --epochs 60   # whether more epochs change it
    python study.py parts --seeds 3 --epochs 10                   # one part less or more each
    python study.py scarce --seeds 3                              # with labels for a tenth of the images
    python study_report.py                                        # tables and pictures of all that

The teachers are in `assets/teachers`, all but `dinov2_s`, which `small_teacher.py` makes (docs/research/results.md).

Protocol, fixed before the methods were compared: CIFAR-100, 50 training images a class, 50 others of the official
training set for every choice, the official test images for the final tables only; six fixed views (shift and flip) of
every training image, one an epoch; AdamW, cosine, the same initial student and order of images for every method with
one seed. A run that is in the output file is not run again.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jobs
import torch
from jobs import CLASSES, EVALUATIONS, PAIRS, PIXELS, PROTOCOL, TEACHERS, Job, parse_method
from recorded import RecordedViews, record_views, view_of
from torch import Tensor, nn

from hetkd import Distiller
from hetkd.data import cifar100_split, load_images
from hetkd.data.sets import Labelled
from hetkd.models import build_small, load_weights
from hetkd.training.records import Row, git_revision, machine, read_rows

COMMITTED = Path(__file__).parents[1] / "assets" / "teachers"


@dataclass(frozen=True)
class Split:
    """Training images (a view of each is what is trained on), validation and test images, with labels."""

    train: Labelled
    validation: Labelled
    test: Labelled


def main() -> None:
    """Record teachers, or train what is not in the output file yet."""
    arguments = parse_arguments()
    if arguments.what == "record":
        for name in dict.fromkeys(pair.split(":")[0] for pair in arguments.pairs):
            record(name, arguments)
        return
    run_all(jobs_of(arguments), arguments)


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """Return what is asked for, seed by seed, so that a run that is stopped has whole seeds."""
    lists = {"final": jobs.FINAL, "searched": jobs.SEARCHED, "scarce": jobs.FINAL, "parts": jobs.PARTS}
    asked = arguments.methods or lists[arguments.what]
    kind = {"try": "trial", "searched": "final", "parts": "part"}.get(arguments.what, arguments.what)
    return [
        Job(pair, *parse_method(words), seed=seed, kind=kind, epochs=arguments.epochs)
        for seed in range(arguments.seeds)
        for words in asked
        for pair in arguments.pairs
    ]


def run_all(jobs: Iterable[Job], arguments: argparse.Namespace) -> None:
    """Train what is not there yet, some at a time with one thread each, and add a line a student to the output."""
    rows = read_rows(arguments.output)
    if any(row["protocol"] != PROTOCOL for row in rows):
        raise SystemExit(f"{arguments.output} has runs under another protocol: choose another --output.")
    done = {row["key"] for row in rows}
    todo = [job for job in jobs if job.key not in done]
    context = multiprocessing.get_context("spawn")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs_of_runs = {pool.submit(train, job, arguments.recorded, arguments.students): job for job in todo}
        for finished in as_completed(jobs_of_runs):
            try:
                row = finished.result()
            except ValueError as error:  # one method that fails must not cost the others
                print(f"{jobs_of_runs[finished].key} failed: {error}", flush=True)
                continue
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['pair']}  {row['method']} {row['options'] or ''}  seed {row['seed']}: "
                f"validation {row['validation']:.2f} % ({row['seconds']:.0f} s)",
                flush=True,
            )


@cache
def load_split() -> Split:
    """Load the images: of each class the first to train on, and some to validate on, spread over the others.

    The strips of `image_data.py` are sorted by the word that an image was found by, so that the first and the last
    of a class are of different kinds; the teachers, too, were trained on first ones.
    """
    images, labels = cifar100_split("train")
    of_class = [(labels == label).nonzero()[:, 0] for label in range(CLASSES)]
    count, wanted = PROTOCOL["images_a_class"], PROTOCOL["validation_images_a_class"]
    others = [index[2 * count :] for index in of_class]
    train = torch.cat([index[:count] for index in of_class])
    validation = torch.cat([index[:: len(index) // wanted][:wanted] for index in others])
    return Split((images[train], labels[train]), (images[validation], labels[validation]), cifar100_split("test"))


def record(name: str, arguments: argparse.Namespace) -> None:
    """Record a teacher at the stages that methods compare, and print its accuracy on the validation images."""
    teacher, size = load_teacher(name, arguments.teachers)
    student = next(pair.split(":")[1] for pair in PAIRS if pair.startswith(f"{name}:"))
    distiller = Distiller(
        teacher,
        build_small(student, PIXELS[student], CLASSES, 3)[0],
        "fitnet",
        input_size={"teacher": size, "student": PIXELS[student]},
    )
    print(distiller.plan)
    split = load_split()
    top1 = Distiller(None, teacher, "ce", input_size=size).evaluate(split.validation)["top1"]
    print(f"{name}: {top1:.2f} % of the validation images")
    record_views(distiller, split.train[0], PROTOCOL["views"], arguments.recorded / name)


def load_teacher(name: str, folder: Path) -> tuple[nn.Module, int]:
    """Load a teacher that `small_teacher.py` made, or that comes with this recipe; return its input size too."""
    file = f"cifar100-{teachers_digest()}-{PIXELS[name]}px-{TEACHERS[name]}.safetensors"
    path = next((path for path in (folder / file, COMMITTED / file) if path.exists()), None)
    if path is None:
        raise SystemExit(
            f"neither {folder} nor {COMMITTED} has {file}: train it by small_teacher.py (docs/research/results.md), or "
            "choose --pairs. One with another digest learnt from other images, maybe from those to validate on."
        )
    teacher, size = build_small(TEACHERS[name], PIXELS[name], CLASSES, 3)
    load_weights(teacher, path)
    return teacher.eval(), size


@cache
def teachers_digest() -> str:
    """Return what the files of teachers are named after: a digest of the images that they learn from."""
    return load_images("cifar100").first(2 * PROTOCOL["images_a_class"] * CLASSES).digest[:8]


def student_path(folder: Path, pair: str, method: str) -> Path:
    """Return where the student of the first seed is, by a method with its defaults."""
    return folder / f"{pair.replace(':', '-')}-{method}.safetensors"


def train(job: Job, recorded: Path, students: Path) -> Row:
    """Train one student, and return its line."""
    split, (teacher_name, student_name) = load_split(), job.pair.split(":")
    images, labels = split.train
    torch.manual_seed(job.seed)
    student, size = build_small(student_name, PIXELS[student_name], CLASSES, 3)
    # On these CPUs convolutions are faster on channels_last.
    distiller = make_distiller(job, teacher_name, student.to(memory_format=torch.channels_last), size)
    views = RecordedViews(recorded / teacher_name)
    order = torch.Generator().manual_seed(job.seed)
    steps = len(images) // PROTOCOL["batch_size"]
    optimizer, schedule = make_optimizer(distiller, job.epochs * steps)
    curve, seconds = [], 0.0
    for epoch in range(job.epochs):
        start = time.perf_counter()
        distiller.train()
        view = epoch % PROTOCOL["views"]
        for index, has_labels in batches(labels, job.labelled, distiller.method.uses_teacher, order):
            targets = None
            if distiller.method.uses_teacher:
                targets = distiller.method.encode(views.features(distiller.method.teacher_stages(), view, index))
            batch = view_of(images, index, view)
            distiller(batch, labels[index] if has_labels else None, targets).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if (epoch + 1) * EVALUATIONS // job.epochs > epoch * EVALUATIONS // job.epochs:
            curve.append((epoch + 1, accuracy(distiller, split.validation)))
    usual = job.kind == "final" and job.seed == 0 and not job.options and job.epochs == PROTOCOL["epochs"]
    if usual:  # then the report draws its features
        students.mkdir(parents=True, exist_ok=True)
        distiller.save_student(student_path(students, job.pair, job.method))
    return {
        "key": job.key,
        **asdict(job),
        "validation": curve[-1][1],
        "test": accuracy(distiller, split.test) if job.kind != "trial" else None,
        "curve": curve,
        "seconds": seconds,
        "images_per_second": job.epochs * steps * PROTOCOL["batch_size"] / seconds,
        "added_parameters": distiller.plan.added_parameters,
        "protocol": PROTOCOL,
        "settings": distiller.method.settings(),
        "git_revision": git_revision(),
        "machine": machine(),
    }


def make_distiller(job: Job, teacher_name: str, student: nn.Module, size: int) -> Distiller:
    """Make the distiller of a job; the teacher has no weights, for its features are recorded."""
    names = job.method.split("+")
    if job.method == "ce":
        return Distiller(None, student, "ce", input_size=size)
    teacher, teacher_size = build_small(TEACHERS[teacher_name], PIXELS[teacher_name], CLASSES, 3)
    sizes = {"teacher": teacher_size, "student": size}
    return Distiller(teacher, student, names if len(names) > 1 else job.method, input_size=sizes, **job.options)


def make_optimizer(distiller: Distiller, steps: int, lr: float = PROTOCOL["lr"]) -> tuple[torch.optim.Optimizer, Any]:
    """Make AdamW and its schedule, a step at a time: cosine up for the warm-up, then cosine down."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=PROTOCOL["weight_decay"], fused=True)
    share = PROTOCOL["warmup_epochs"] / PROTOCOL["epochs"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=share, div_factor=100, cycle_momentum=False
    )
    return optimizer, schedule


def batches(
    labels: Tensor, labelled: float, uses_teacher: bool, order: torch.Generator
) -> Iterator[tuple[Tensor, bool]]:
    """Yield the image indices of an epoch's batches, and whether their labels are used.

    Where few images have labels, every second batch is of these (again and again), the others are of all images
    and without labels; a method without a teacher gets labelled batches only, as many.
    """
    size, count = PROTOCOL["batch_size"], len(labels) // PROTOCOL["batch_size"]
    every = torch.randperm(len(labels), generator=order).split(size)[:count]
    if labelled == 1.0:
        yield from ((index, True) for index in every)
        return
    kept = int(labelled * PROTOCOL["images_a_class"])
    known = torch.arange(len(labels)).unflatten(0, (CLASSES, -1))[:, :kept].flatten()
    for number, index in enumerate(every):
        if uses_teacher and number % 2:
            yield index, False
        else:
            yield known[torch.randint(len(known), (size,), generator=order)], True


@torch.no_grad()
def accuracy(distiller: Distiller, data: Labelled) -> float:
    """Return the student's top-1 in percent."""
    distiller.eval()
    parts = zip(*(x.split(250) for x in data), strict=True)
    right = sum(int((distiller.predict(images).argmax(1) == labels).sum()) for images, labels in parts)
    return 100 * right / len(data[1])


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "try", "final", "searched", "scarce", "parts"])
    pairs = [*PAIRS, jobs.HOMOGENEOUS]
    parser.add_argument("--pairs", nargs="+", choices=pairs, default=PAIRS, metavar="PAIR", help=f"of {pairs}")
    parser.add_argument("--methods", nargs="+", metavar="NAME[:OPTION=VALUE,...]")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=PROTOCOL["epochs"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--teachers", type=Path, default=Path("runs/teachers"), metavar="DIR")
    parser.add_argument("--recorded", type=Path, default=Path("runs/recorded"), metavar="DIR")
    parser.add_argument("--students", type=Path, default=Path("runs/students"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("docs/research/lines/runs.jsonl"), metavar="FILE")
    arguments = parser.parse_args(words)
    if arguments.what == "try" and not arguments.methods:
        parser.error("try needs --methods")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"study.py: {error}") from error
