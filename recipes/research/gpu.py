"""The literature's scale on a lent GPU: all of CIFAR-100, ResNet18 and MobileNetV2, one command within ten minutes.

    PYTHONPATH=recipes/bench python recipes/research/gpu.py --minutes 8.8 --output runs/gpu
    PYTHONPATH=recipes/bench python recipes/research/gpu.py --dry --cpu --output runs/gpu/dry  # rehearses it

`gpu_pack.py` packs data, weights and wheels for a machine without a network, and says how to run this there.
Lines go to `OUTPUT/gpu.jsonl`, each as soon as it is known; a step that does not fit into the minutes left is skipped.
The steps, in order of what matters most:

1. `teacher`: EfficientNet-Lite0 from ImageNet weights, fine-tuned at 96 px on all 50,000 images; one that is in
   `--teacher` is taken instead.
2. `study`: ResNet18 by the first five methods.
3. `cost`: training steps of every method over the floor, CUDA graphs, `fit` over the bare step (`gpu_cost.py`).
4. `compile`: steps of some methods compiled, over the compiled floor.
5. `rest`: MobileNetV2 by the first five methods, both students by the others, then more seeds.

Protocol, fixed before the methods were compared: the official 50,000 training images at 32 px; eight fixed views of
each (shift of up to four pixels, reflected at the border, and flip), one an epoch, for which the teacher's features
are recorded once, in half precision on the GPU; batch 256; AdamW at 2e-3, weight decay 0.05 (none for biases and
norms), 10 % warm-up and cosine, as in `study.py`, because the methods' weights were searched with it; bfloat16
autocast, channels_last; the same initial student, order and views for every method with one seed; baselines with the
settings searched in `study.py`; top-1 of the last epoch on all 10,000 test images. There are as many epochs, 20 at
most, as the time allows for five methods: their steps are timed on a few batches before the first student is trained.
"""

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_cost import COST_SECONDS, measure_compiled, measure_cost
from gpu_teacher import Recorded, Session, build_student, get_teacher, load_data, make_distiller, record, start_session
from jobs import SEARCHED, Job, parse_method
from study import accuracy, make_optimizer
from timing import now
from torch import Tensor, nn

from hetkd.data.sets import Labelled
from hetkd.training.records import machine

WEIGHTS = "efficientnet_lite0/tf_efficientnet_lite0_timm.safetensors"
STUDENTS = ["resnet18", "mobilenetv2"]
METHODS = [
    next(words for words in SEARCHED if words.partition(":")[0] == name)
    for name in ("ce", "sfkd", "kd", "uhkd", "fitnet", "ofa", "rsd", "dkd")
]
FIRST, MOST_EPOCHS = 5, 20
STUDENT_SECONDS = 3.0  # of a student, beside its training


class Study(NamedTuple):
    """What all students have in common."""

    session: Session
    teacher: nn.Module
    recorded: Recorded
    test: Labelled
    arguments: argparse.Namespace


class Run:
    """A student in training, on the recorded views."""

    def __init__(self, study: Study, job: Job) -> None:
        self.session, self.job, self.recorded = study.session, job, study.recorded
        self.batch = study.arguments.batch_size
        self.steps = len(self.recorded.labels) // self.batch
        torch.manual_seed(job.seed)
        student = build_student(job.pair.split(":")[1], study.arguments.classes).to(self.session.device)
        self.distiller = make_distiller(study.teacher, student, job.method, **job.options)
        if study.arguments.compile:
            self.distiller.compile()
        self.optimizer, self.schedule = make_optimizer(self.distiller, job.epochs * self.steps)
        self.order = torch.Generator().manual_seed(job.seed)

    def step(self, view: int, index: Tensor) -> Tensor:
        """Train on some images, and return the loss."""
        recorded, distiller = self.recorded, self.distiller
        targets = recorded.targets(distiller, view, index) if distiller.method.uses_teacher else None
        with self.session.autocast():
            loss = distiller(recorded.images[view][index], recorded.labels[index], targets).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train(self) -> tuple[int, float]:
        """Train for all epochs, unless they take too long; return how many it were, and the last batch's loss."""
        loss, start, done = torch.zeros(()), now(self.session.device), 0
        while done < self.job.epochs:
            self.distiller.train()
            for index in self.batches():
                loss = self.step(done % len(self.recorded.images), index)
            done += 1
            an_epoch = (now(self.session.device) - start) / done
            if an_epoch * (self.job.epochs - done) > self.session.left:
                break
        return done, loss.item()

    def batches(self) -> Iterator[Tensor]:
        """Yield the image indices of an epoch's batches, in the order that the seed decides."""
        order = torch.randperm(len(self.recorded.labels), generator=self.order).to(self.session.device)
        yield from order.split(self.batch)[: self.steps]

    def seconds_of_a_step(self, count: int) -> float:
        """Time some steps, after as many that warm up."""
        self.distiller.train()
        start, index = 0.0, next(self.batches())
        for number in range(2 * count):
            if number == count:
                start = now(self.session.device)
            self.step(0, index)
        return (now(self.session.device) - start) / count


def main(words: list[str] | None = None) -> None:
    """Take the steps, one after another."""
    arguments = parse_arguments(words)
    session = start_session(arguments, "gpu")
    train, test = load_data(arguments, session.device)
    arguments.classes = int(train[1].max()) + 1
    session.say(f"{len(train[1])} training and {len(test[1])} test images on {machine()}")
    teacher = get_teacher(session, arguments, train, test)
    study = None
    if "study" in arguments.steps:
        study = Study(session, teacher, record(session, teacher, train, arguments), test, arguments)
        arguments.epochs = arguments.epochs or epochs_that_fit(study)
        train_students(study, rounds(arguments)[0])
    if "cost" in arguments.steps:
        measure_cost(session, teacher, train, arguments)
    if "compile" in arguments.steps:
        measure_compiled(session, teacher, train, arguments)
    if study is not None and "rest" in arguments.steps:
        train_students(study, chain(*rounds(arguments)[1:]))
    session.say(f"done, {session.failed} failures")


def rounds(arguments: argparse.Namespace) -> list[list[Job]]:
    """Return the students to train: those before the costs, then the others in order."""
    first, last = arguments.methods[:FIRST], arguments.methods[FIRST:]
    students, head = arguments.students, arguments.students[:1]
    plan = [(head, first, 0), (students[1:], first, 0), (students, last, 0)]
    plan += [(students, first, seed) for seed in range(1, arguments.seeds)]
    return [
        [
            Job(f"lite0:{student}", *parse_method(method), seed=seed, kind="gpu", epochs=arguments.epochs)
            for student in of_round
            for method in methods
        ]
        for of_round, methods, seed in plan
    ]


def epochs_that_fit(study: Study) -> int:
    """Time the steps of the first round, and return the epochs for which the time suffices."""
    session, arguments = study.session, study.arguments
    arguments.epochs = 1  # of the runs that are timed
    steps = {job.method: Run(study, job).seconds_of_a_step(arguments.timed) for job in rounds(arguments)[0]}
    reserve = STUDENT_SECONDS * len(steps) + (COST_SECONDS if "cost" in arguments.steps else 0.0)
    an_epoch = 1.03 * sum(steps.values()) * (len(study.recorded.labels) // arguments.batch_size)
    epochs = max(1, min(MOST_EPOCHS, int((session.left - reserve) / an_epoch)))
    milliseconds = {method: round(1e3 * seconds, 2) for method, seconds in steps.items()}
    session.write("epochs", epochs=epochs, milliseconds=milliseconds)
    session.say(f"{epochs} epochs; milliseconds of a step: {milliseconds}")
    return epochs


def train_students(study: Study, jobs: Iterable[Job]) -> None:
    """Train the students for which there is time."""
    for job in jobs:
        if study.session.left < STUDENT_SECONDS:
            study.session.say(f"no time for {job.pair} {job.method}, seed {job.seed}")
        else:
            study.session.attempt(job.key, partial(train_student, study, job))


def train_student(study: Study, job: Job) -> None:
    """Train one student, and write its line; one that was stopped for want of time has no accuracy."""
    session, device = study.session, study.session.device
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    run = Run(study, job)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    epochs, loss = run.train()
    seconds = now(device) - start
    whole = epochs == job.epochs
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    with session.autocast():
        top1 = accuracy(run.distiller, study.test) if whole else None
    session.write(
        "study",
        key=job.key,
        **asdict(job),
        test=top1,
        epochs_done=epochs,
        loss=loss,
        seconds=seconds,
        images_per_second=epochs * run.steps * run.batch / seconds,
        peak_bytes=peak,
        added_parameters=run.distiller.plan.added_parameters,
        settings=run.distiller.method.settings(),
        batch_size=run.batch,
        views=len(run.recorded.images),
        compiled=study.arguments.compile,
    )
    found = f"{top1:.2f} %" if whole else f"stopped after {epochs} epochs"
    session.say(f"{job.pair} {job.method}, seed {job.seed}: {found} ({seconds:.0f} s, loss {loss:.2f})")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = Path(os.environ.get("HETKD_DATA", "")) / WEIGHTS
    steps = ["study", "cost", "compile", "rest"]
    parser.add_argument("--minutes", type=float, default=8.8, help="of all steps together")
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps, help="after the teacher; rest needs study")
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[:OPTION=VALUE,...]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: as many as fit, 20 at most")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="compile the students' blocks and the methods")
    parser.add_argument("--images", type=int, default=50_000, help="of each split, at most")
    parser.add_argument("--random", action="store_true", help="random images and weights, no files")
    parser.add_argument("--weights", type=Path, default=weights, metavar="FILE", help="that the teacher starts from")
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="load the teacher, or else save it there")
    parser.add_argument("--teacher-seconds", type=float, default=70.0, help="at most, of its training")
    parser.add_argument("--timed", type=int, default=15, help="steps that are timed for each figure")
    parser.add_argument("--revision", help="of the code, where there is no git")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--dry", action="store_true", help="the shortest form: all steps, a few images")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR")
    arguments = parser.parse_args(words)
    if arguments.dry:
        arguments.images, arguments.batch_size, arguments.views, arguments.epochs = 64, 16, 2, arguments.epochs or 1
        arguments.timed, arguments.seeds = 1, 1
    if not (arguments.random or arguments.weights.is_file()):
        parser.error(f"--weights {str(arguments.weights)!r} is no file")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"gpu.py: {error}") from error
