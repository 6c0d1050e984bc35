"""What training steps cost on a GPU: all methods over the floor, compiled, as CUDA graphs, and `fit` over the step.

The floor is the forward of the teacher, and forward, backward and update of the student, on images that are ready for
both. Contenders take turns, some steps at a time between two CUDA events; figures are medians over the rounds. In fp32
cuDNN's convolutions compute in TF32, which is PyTorch's default.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from gpu_teacher import Session, build_student, make_distiller
from steps import FLOOR, METHODS, REFINED, Contender
from timing import operations_of, peak_memory
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hetkd.data.sets import Labelled
from hetkd.methods.common.stagewise import count_parameters

COST_SECONDS = 80.0  # of `measure_cost`
STUDENTS = ["resnet18", "resnet_slim"]
MOST = ["sfkd", "kd", "uhkd", "fitnet"]  # that are compiled and captured too
STEPS_A_TURN, ROUNDS = 4, 6
COMPILE_SECONDS = 45.0  # for each student
RECOMPILATIONS = 256
LOOP_BATCHES = 100


def measure_cost(session: Session, teacher: nn.Module, data: Labelled, arguments: argparse.Namespace) -> None:
    """Write a line for each student, precision and method, while there is time."""
    parts = [eager, captured, loop] if session.device.type == "cuda" else [eager, loop]
    end = max(session.left - COST_SECONDS, 0.0)
    _measure(session, teacher, data, arguments, parts, end)


def measure_compiled(session: Session, teacher: nn.Module, data: Labelled, arguments: argparse.Namespace) -> None:
    """Write a line for each student and the methods that matter most, compiled, while there is time."""
    _measure(session, teacher, data, arguments, [compiled], COMPILE_SECONDS)


def _measure(
    session: Session,
    teacher: nn.Module,
    data: Labelled,
    arguments: argparse.Namespace,
    parts: Sequence[Callable[["Bench"], None]],
    end: float,
) -> None:
    """Call the parts for each student, unless fewer seconds than ``end`` are left."""
    for part, name in ((part, name) for part in parts for name in STUDENTS):
        if session.left < end:
            session.say(f"no time for the cost of {name}, {part.__name__}")
            continue
        bench = Bench(session, copy.deepcopy(teacher), data, name, arguments)
        if session.attempt(f"cost of {name}, {part.__name__}", partial(part, bench)):
            session.say(f"cost of {name}, {part.__name__}, measured")


class Bench:
    """Contenders for one student on one batch.

    Args:
        session: Where.
        teacher: Shared by all.
        data: Images and labels on the device, whose first are the batch.
        student: A name of `build_student`.
        arguments: The command line's.
    """

    def __init__(
        self, session: Session, teacher: nn.Module, data: Labelled, student: str, arguments: argparse.Namespace
    ) -> None:
        self.session, self.teacher, self.student = session, teacher.eval(), student
        self.data, batch = data, arguments.batch_size
        self.images, self.labels = data[0][:batch], data[1][:batch]
        self.classes, self.dry, self.half = arguments.classes, arguments.dry, True

    def contender(self, method: str, *, compile: bool = False, capturable: bool = False) -> Contender:
        """Make the floor or a method of hetkd; one whose step can be captured in a graph needs more of AdamW."""
        torch.manual_seed(0)
        options = {"ds2s": "full"} if method == REFINED else {}
        name = "kd" if method == FLOOR else method.split()[0]
        student = build_student(self.student, self.classes).to(self.session.device)
        distiller = make_distiller(self.teacher, student, name, **options).train()
        if compile:
            distiller.compile()
        module = distiller.student if method == FLOOR else distiller
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True, capturable=capturable)
        ready = [distiller.taps[role].prepare(self.images) for role in ("teacher", "student")]

        def loss() -> torch.Tensor:
            if method != FLOOR:
                return distiller(self.images, self.labels).loss
            with torch.no_grad():
                self.teacher(ready[0])
            return F.cross_entropy(distiller.student(ready[1]), self.labels)

        def step() -> None:
            with self.session.autocast(self.half, cache=not capturable):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        added = 0 if method == FLOOR else count_parameters(distiller.method)
        return Contender(step, [module, optimizer], added)

    def write_rows(self, made: Mapping[str, Contender], mode: str) -> None:
        """Measure the contenders in turns, and write a line each."""
        if FLOOR not in made:
            return
        times = self.take_turns({name: each.step for name, each in made.items()})
        precision = "bf16" if self.half else "fp32"
        for name, each in made.items():
            ratios = [taken / floor for taken, floor in zip(times[name], times[FLOOR], strict=True)]
            held = [*each.modules, self.teacher, self.images]
            self.session.write(
                "cost",
                student=self.student,
                precision=precision,
                mode=mode,
                method=name,
                batch_size=len(self.images),
                milliseconds=statistics.median(times[name]),
                ratio=statistics.median(ratios),
                ratios=[round(ratio, 3) for ratio in ratios],
                images_per_second=1e3 * len(self.images) / statistics.median(times[name]),
                kernels=None if mode == "captured" else self.kernels_of(each.step),
                peak_bytes=None if mode == "captured" else peak_memory(each.step, self.session.device, *held),
                added_parameters=each.added_parameters,
            )

    def take_turns(self, steps: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Return the milliseconds of a step in each round but the first, which warms up."""
        generator, times = random.Random(0), {name: list[float]() for name in steps}
        for number in range((1 if self.dry else ROUNDS) + 1):
            for name in generator.sample(list(steps), len(steps)):
                taken = self.milliseconds(steps[name], 1 if self.dry else STEPS_A_TURN)
                if number:
                    times[name].append(taken)
        return times

    def milliseconds(self, step: Callable[[], Any], count: int) -> float:
        """Return those of a step, the mean of some in a row."""
        if self.session.device.type != "cuda":
            start = time.perf_counter()
            repeat(step, count)
            return 1e3 * (time.perf_counter() - start) / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        repeat(step, count)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / count

    def kernels_of(self, step: Callable[[], Any]) -> int | None:
        """Return how many kernels a step launches; without a GPU how many of PyTorch's operations it runs."""
        if self.session.device.type != "cuda":
            return operations_of(step)
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                step()
                torch.cuda.synchronize()
        except RuntimeError:  # some virtual machines refuse the profiler
            return None
        found = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in found)


def eager(bench: Bench) -> None:
    """Measure all methods as they are, in both precisions."""
    made = {method: bench.contender(method) for method in [FLOOR, *(MOST[:2] if bench.dry else METHODS)]}
    for bench.half in (True, False):
        bench.write_rows(made, "eager")


def compiled(bench: Bench) -> None:
    """Measure the floor and the methods that matter most compiled, two at least, as many as there is time for."""
    torch._dynamo.config.recompile_limit = RECOMPILATIONS  # all blocks share the code of nn.Module's call
    start, made = time.perf_counter(), dict[str, Contender]()
    for method in [FLOOR, *MOST]:
        late = bench.dry or time.perf_counter() - start > COMPILE_SECONDS or bench.session.left < COMPILE_SECONDS / 2
        if len(made) > 1 and late:
            break
        contender = bench.contender(method, compile=True)
        if bench.session.attempt(f"compiling {method}", contender.step):
            made[method] = contender
            bench.session.say(f"{method} compiled, {time.perf_counter() - start:.0f} s together")
    bench.write_rows(made, "compiled")


def captured(bench: Bench) -> None:
    """Measure whole steps of the floor and of the methods that matter most as CUDA graphs."""
    made: dict[str, Contender] = {}
    for method in [FLOOR, *(MOST[:1] if bench.dry else MOST)]:
        contender = bench.contender(method, capturable=True)
        graph = torch.cuda.CUDAGraph()
        if bench.session.attempt(f"capturing {method}", partial(capture, graph, contender.step)):
            made[method] = Contender(graph.replay, contender.modules, contender.added_parameters)
    bench.write_rows(made, "captured")


def capture(graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> None:
    """Capture a step, after some that warm up on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeat(step, 3)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()


def repeat(step: Callable[[], Any], count: int) -> None:
    """Call a step some times."""
    for _ in range(count):
        step()


def loop(bench: Bench) -> None:
    """Compare the speed of `fit`, on images that stay on the device, with that of the step alone."""
    batch = len(bench.labels)
    count = 2 if bench.dry else min(LOOP_BATCHES, len(bench.data[1]) // batch)
    data = (bench.data[0][: count * batch], bench.data[1][: count * batch])
    options: dict[str, Any] = {"mixed_precision": "bf16", "augment": K.RandomHorizontalFlip(p=0.5)}
    options |= {"progress": False, "cpu": bench.session.device.type == "cpu", "batch_size": batch, "epochs": 2}
    for method in ("kd", "sfkd"):
        contender = bench.contender(method)
        bench.milliseconds(contender.step, 2)
        bare = 1e3 * batch / bench.milliseconds(contender.step, count)
        fit = contender.modules[0].fit(data, **options).history[-1]["images_per_second"]
        facts = {"student": bench.student, "method": method, "batch_size": batch}
        bench.session.write("loop", **facts, step_images=bare, fit_images=fit, ratio=fit / bare)
        bench.session.say(f"{bench.student}, {method}: fit {fit:.0f} images/s, bare step {bare:.0f}")
