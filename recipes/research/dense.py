"""Students for street scenes, CamVid: methods side by side, on a lent GPU or a patient CPU.

    PYTHONPATH=recipes/bench python recipes/research/dense.py --minutes 9 --workers 8 --output runs/dense
    PYTHONPATH=recipes/bench python recipes/research/dense.py --dry --cpu --output runs/dense/dry  # rehearses it

Lines go to `OUTPUT/dense.jsonl`, each as soon as it is known; a run that is in there already is not repeated.
`gpu_pack.py camvid` packs what a machine without a network needs.

Protocol, fixed before the methods were compared: CamVid's 367 training images; sixteen fixed views of each (crop of
25 to 100 % of the area to 240 x 320, flip, colour), one an epoch, for which the teacher's features are recorded once,
in half precision; students from scratch with torchvision's LR-ASPP; batch 16; AdamW at 2e-3, weight decay 0.05 (none
for biases and norms), 10 % warm-up and cosine, 80 epochs; the student of the last epoch counts, on whole images of
240 x 320, against masks of 360 x 480: settings are chosen on the 101 validation images, the table is of the 233 test
images. Several processes train on one GPU at the same time, for a small student leaves most of it idle.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dense_data import (
    TEACHERS,
    Split,
    Views,
    build_student,
    build_teacher,
    get_teacher,
    load_data,
    make_distiller,
    measure,
    record,
    teacher_name,
)
from gpu_teacher import Session, start_session
from jobs import Job, parse_method
from study import make_optimizer
from timing import now
from torch import Tensor, multiprocessing, nn

from hetkd import Distiller
from hetkd.training.records import machine

STUDENTS = ["mobilenetv3_small_050", "resnet10t"]
METHODS = ["ce", "kd", "cwd", "fitnet", "uhkd", "sfkd"]
BATCH = 16


class Study(NamedTuple):
    """What all students of a process have in common."""

    session: Session
    teacher: nn.Module
    views: Views
    splits: dict[str, Split]
    arguments: argparse.Namespace


def main(words: list[str] | None = None) -> None:
    """Train the teacher, record it, and train students in several processes."""
    arguments = parse_arguments(words)
    session = start_session(arguments, "dense")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    splits = load_data(arguments, session.device)
    session.say(f"{', '.join(f'{len(x.masks)} {name}' for name, x in splits.items())} images on {machine()}")
    teacher = get_teacher(session, arguments, splits)
    file = arguments.scratch / f"{arguments.views}-views-{teacher_name(arguments)}.safetensors"
    if not file.exists():
        record(session, teacher, splits["train"], arguments).save(file)
    jobs = [job for job in all_jobs(arguments) if job.key not in done_in(arguments.output)]
    del teacher, splits
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    ends = time.time() + session.left
    if arguments.workers == 0:
        work(arguments, jobs, ends, file)
    else:
        work_in_processes(arguments, jobs, ends, file)
    session.say("done")


def all_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return the students to train: all methods and students of the first seed, then of the next."""
    return [
        Job(f"{arguments.teacher}:{student}", *parse_method(method), seed=seed, kind="dense", epochs=arguments.epochs)
        for seed in arguments.seeds
        for method in arguments.methods
        for student in arguments.students
    ]


def done_in(output: Path) -> set[str]:
    """Return the keys of the runs that have their line."""
    file = output / "dense.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["key"] for row in rows if row["step"] == "student" and row["epochs_done"] == row["epochs"]}


def work_in_processes(arguments: argparse.Namespace, jobs: list[Job], ends: float, file: Path) -> None:
    """Deal the jobs out to processes that share the device."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for job in jobs:
        queue.put(job)
    for _ in range(arguments.workers):
        queue.put(None)
    processes = [context.Process(target=work, args=(arguments, queue, ends, file)) for _ in range(arguments.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def work(arguments: argparse.Namespace, jobs: Any, ends: float, file: Path) -> None:
    """Train one student after another, of a list or a queue that ends with ``None``, until the time is over."""
    torch.set_num_threads(1)
    session = start_session(arguments, "dense")
    session.seconds = ends - time.time()
    views = Views.load(file, session.device)
    study = Study(session, build_teacher(arguments.teacher), views, load_data(arguments, session.device), arguments)
    for job in jobs if isinstance(jobs, list) else iter(jobs.get, None):
        if session.left > 0:
            session.attempt(job.key, partial(train_student, study, job))


def train_student(study: Study, job: Job) -> None:
    """Train one student, and write its line; one that was stopped for want of time has no metrics."""
    session, views = study.session, study.views
    torch.manual_seed(job.seed)
    student = build_student(job.pair.split(":")[1])
    teacher = None if job.method == "ce" else study.teacher
    distiller = make_distiller(teacher, student, TEACHERS[study.arguments.teacher].size, job.method, **job.options)
    distiller.to(session.device)
    count = views.masks.shape[1]
    steps = max(1, count // BATCH)
    optimizer, schedule = make_optimizer(distiller, job.epochs * steps)
    order, start, done, loss = torch.Generator().manual_seed(job.seed), now(session.device), 0, torch.zeros(())
    for epoch in range(job.epochs):
        distiller.train()
        view = epoch % len(views.masks)
        for index in torch.randperm(count, generator=order).to(session.device).split(BATCH)[:steps]:
            loss = step(study, distiller, view, index)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        done, taken = epoch + 1, now(session.device) - start
        if taken / done * (job.epochs - done) > session.left:
            break
    whole, seconds = done == job.epochs, now(session.device) - start
    splits = ("val", "test") if whole else ()
    found = {split: measure(session, distiller, study.splits[split]) for split in splits}
    if whole and job.seed == 0:
        distiller.save_student(study.arguments.output / "students" / f"{file_name(job)}.safetensors")
    session.write(
        "student",
        key=job.key,
        **asdict(job),
        **found,
        epochs_done=done,
        loss=loss.item(),
        seconds=seconds,
        added_parameters=distiller.plan.added_parameters,
        settings=distiller.method.settings(),
        batch_size=BATCH,
        images=count,
        views=len(views.masks),
    )
    text = f"{found['val']['miou']:.2f}, {found['test']['miou']:.2f}" if whole else f"stopped after {done} epochs"
    session.say(f"{job.pair} {job.method} {job.options or ''}, seed {job.seed}: {text} ({seconds:.0f} s)")


def file_name(job: Job) -> str:
    """Return what the student of a job is called on disk."""
    options = [f"{name}={value}" for name, value in job.options.items()]
    return "-".join([job.pair.replace(":", "-"), job.method, *options]).replace(" ", "")


def step(study: Study, distiller: Distiller, view: int, index: Tensor) -> Tensor:
    """Compute gradients for some images of a view, and return the loss."""
    views = study.views
    targets = views.targets(distiller, view, index) if distiller.method.uses_teacher else None
    with study.session.autocast():
        loss = distiller(views.images[view, index], views.masks[view, index].long(), targets).loss
    loss.backward()
    return loss.detach()


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.8, help="of everything together")
    parser.add_argument("--teacher", choices=list(TEACHERS), default="lite0")
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="NAME")
    parser.add_argument("--methods", nargs="*", default=METHODS, metavar="NAME[:OPTION=VALUE,...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--workers", type=int, default=8, help="processes; 0: this one")
    parser.add_argument("--images", type=int, help="of each split, at most")
    parser.add_argument("--random", action="store_true", help="random images and weights, no files")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HETKD_DATA", "")), metavar="DIR")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for views; default: OUTPUT")
    parser.add_argument("--revision", help="of the code, where there is no git")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--dry", action="store_true", help="the shortest form: all steps, a few images")
    parser.add_argument("--output", type=Path, default=Path("runs/dense"), metavar="DIR")
    arguments = parser.parse_args(words)
    arguments.scratch = arguments.scratch or arguments.output
    if arguments.dry:
        arguments.images, arguments.views, arguments.seeds = 16, 1, [0]
        arguments.epochs = arguments.teacher_epochs = 1
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"dense.py: {error}") from error
