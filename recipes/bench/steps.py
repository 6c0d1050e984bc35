"""Training steps of all methods and of other libraries, against the price of the two models alone."""

from __future__ import annotations

import copy
import logging
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timing import median_interval, now, operations_of, peak_memory, seconds_of
from torch import Tensor, nn

from hetkd import SFKD, Distiller, Method, list_methods, load_model
from hetkd.methods.common.stagewise import count_parameters

PIXELS, CLASSES = 224, 1000
PAIRS = {
    "vit_small->resnet18": ("vit_small_patch16_224", "resnet18"),
    "swin_tiny->resnet18": ("swin_tiny_patch4_window7_224", "resnet18"),
    "swin_tiny->mobilenetv2": ("swin_tiny_patch4_window7_224", "mobilenetv2_100"),
    "convnext_tiny->deit_tiny": ("convnext_tiny", "deit_tiny_patch16_224"),
    "mixer_b->resnet18": ("mixer_b16_224", "resnet18"),
}
FLOOR = "floor"
REFINED = "sfkd ds2s"
PEERS = ("timm.task logits", "timm.task features", "torchdistill kd")
METHODS = [*sorted(set(list_methods("classification")) - {"ce"}), REFINED]
SMALL = ["kd", "uhkd", "sfkd", REFINED, "timm.task logits", "torchdistill kd"]
LEAST_ROUNDS = 5
SMALL_PAIRS = ["vit_small->resnet18", "swin_tiny->mobilenetv2"]


class Pair(NamedTuple):
    """What all contenders work on."""

    teacher: nn.Module
    student: nn.Module
    images: Tensor
    labels: Tensor


@dataclass
class Contender:
    """One way to train.

    Attributes:
        step: Forward of both models, loss, backward, update.
        modules: What lives in memory meanwhile: the distiller or the student, and the optimizer.
        added_parameters: That are learnt beside the student.
    """

    step: Callable[[], Any]
    modules: list[Any] = field(default_factory=list)
    added_parameters: int = 0


def bench_pair(
    name: str,
    methods: Iterable[str],
    batch_size: int,
    repeats: int,
    device: torch.device,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Measure all methods on one pair of models, in turns with the floor.

    Args:
        name: Of `PAIRS`.
        methods: Of `METHODS` and `PEERS`.
        batch_size: Images of a step.
        repeats: Rounds, after one that warms up.
        device: Where it computes.
        seconds: After which no new round begins, but for the first five.

    Returns:
        One row a method.
    """
    pair = make_pair(name, batch_size, device)
    contenders = {FLOOR: floor(pair)}
    for method in methods:
        if method == "torchdistill kd" and not has_torchdistill():
            continue
        contenders[method] = contender(method, pair)
    times = measure_in_turns({method: each.step for method, each in contenders.items()}, repeats, device, seconds)
    memory = {method: peak_of(each, pair, device) for method, each in contenders.items()}
    rows = []
    for method, each in contenders.items():
        taken, ratios = times[method]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        surely = median_interval(ratios)
        rows.append(
            {
                "pair": name,
                "method": method,
                "ratio": ratio,
                "ratio_interval": f"{surely[0]:.3f} to {surely[1]:.3f}",
                "ratio_quartiles": f"{low:.3f} to {high:.3f}",
                "rounds": len(ratios),
                "memory_ratio": memory[method] / memory[FLOOR],
                "added_parameters": each.added_parameters,
                "operations": operations_of(each.step),
                "images_per_second": batch_size / statistics.median(taken),
                "phases": phases(each, pair, device) if isinstance(each.modules[0], Distiller) else {},
            }
        )
    return rows


def measure_in_turns(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, seconds: float = float("inf")
) -> dict[str, tuple[list[float], list[float]]]:
    """Time steps, two at a time between two of the floor, in another order in every round.

    Returns:
        Seconds of each step, and their ratios to the mean of the floors before and after, without the first round.
    """
    generator, began = random.Random(0), now(device)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for round_ in range(repeats + 1):
        if round_ > LEAST_ROUNDS and now(device) - began > seconds:
            break
        before = seconds_of(steps[FLOOR], device)
        order = generator.sample(list(steps), len(steps))
        for names in (order[start : start + 2] for start in range(0, len(order), 2)):
            taken = {name: seconds_of(steps[name], device) for name in names}
            after = seconds_of(steps[FLOOR], device)
            for name in names if round_ else ():
                found[name][0].append(taken[name])
                found[name][1].append(2 * taken[name] / (before + after))
            before = after
    return found


def make_pair(name: str, batch_size: int, device: torch.device) -> Pair:
    """Build untrained models, which cost what trained ones do, and a batch of random images."""
    torch.manual_seed(0)
    teacher, student = (load_model(model, pretrained=False).to(device) for model in PAIRS[name])
    images = torch.rand(batch_size, 3, PIXELS, PIXELS, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    return Pair(teacher.eval().requires_grad_(False), student.train(), images, labels)


def floor(pair: Pair) -> Contender:
    """The forward of the teacher, and forward, backward and update of the student, on images ready for both."""
    student = copy.deepcopy(pair.student)
    optimizer = make_optimizer(student)

    def step() -> None:
        with torch.no_grad():
            pair.teacher(pair.images)
        F.cross_entropy(student(pair.images), pair.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, [student, optimizer])


def contender(name: str, pair: Pair) -> Contender:
    """Make a method of hetkd or of another library."""
    pair = pair._replace(student=copy.deepcopy(pair.student))
    if name in PEERS:
        return {PEERS[0]: timm_logits, PEERS[1]: timm_features, PEERS[2]: torchdistill_kd}[name](pair)
    method: str | Method = SFKD(ds2s="full") if name == REFINED else name
    distiller = Distiller(pair.teacher, pair.student, method).train()
    optimizer = make_optimizer(distiller)

    def step() -> None:
        distiller(pair.images, pair.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, [distiller, optimizer], count_parameters(distiller.method))


def timm_logits(pair: Pair) -> Contender:
    """Make a step of timm's logit distillation."""
    from timm.task import LogitDistillationTask

    return of_timm(LogitDistillationTask(pair.student, pair.teacher, verbose=False, device=pair.images.device), pair)


def timm_features(pair: Pair) -> Contender:
    """Make a step of timm's distillation of the pooled feature."""
    from timm.task import FeatureDistillationTask

    return of_timm(FeatureDistillationTask(pair.student, pair.teacher, verbose=False, device=pair.images.device), pair)


def of_timm(task: Any, pair: Pair) -> Contender:
    """Make a step of a task of timm."""
    optimizer = make_optimizer(task.trainable_module)

    def step() -> None:
        task(pair.images, pair.labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    task.train()
    added = count_parameters(task.trainable_module) - count_parameters(pair.student)
    return Contender(step, [task.trainable_module, optimizer], added)


def has_torchdistill() -> bool:
    """Say whether torchdistill is installed (``pip install ".[bench]"``)."""
    try:
        import torchdistill  # noqa: F401
    except ImportError:
        return False
    return True


def torchdistill_kd(pair: Pair) -> Contender:
    """Make a step of torchdistill's knowledge distillation, by its own box and optimizer."""
    from torchdistill.core.distillation import DistillationBox

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    outputs = {f"{role}_module_{what}" for role in ("student", "teacher") for what in ("path", "io")}
    places = {name: "." if name.endswith("path") else "output" for name in outputs}
    hooks: dict[str, Any] = {"input": [], "output": []}
    model = {"forward_proc": "forward_batch_only", "sequential": [], "forward_hook": hooks, "wrapper": None}
    loss = {"key": "KDLoss", "kwargs": {**places, "temperature": 1.0, "alpha": 0.5}}
    settings = {
        "num_epochs": 1,
        "teacher": {**model, "requires_grad": False, "frozen_modules": []},
        "student": model,
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-3, "fused": True}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(pair.teacher, pair.student, {}, settings, pair.images.device, None, False, 1)
    pair.teacher.eval()

    def step() -> None:
        box.post_forward_process(box.forward_process(pair.images, targets=pair.labels, supp_dict=None))

    return Contender(step, [pair.student, box.optimizer])


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """Make the same optimizer for everyone."""
    return torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-3, fused=True)


def peak_of(each: Contender, pair: Pair, device: torch.device) -> int:
    """Return the peak of memory of a step, with the weights of both models and the optimizer's moments."""
    return peak_memory(each.step, device, *each.modules, pair.teacher, pair.images)


def phases(each: Contender, pair: Pair, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Return where the milliseconds of a step go, the least of some runs."""
    distiller, optimizer = each.modules
    method = distiller.method
    teachers = [tap for role, tap in distiller.taps.items() if role != "student"]
    student = distiller.taps["student"]
    best: dict[str, float] = {}
    for _ in range(repeats):
        marks = [now(device)]
        with torch.no_grad():
            ready = [tap.prepare(pair.images) for tap in (*teachers, student)]
            marks.append(now(device))
            features = [tap.run_prepared(x) for tap, x in zip(teachers, ready, strict=False)]
            marks.append(now(device))
            targets = method.encode(*features)
        marks.append(now(device))
        outputs = student.run_prepared(ready[-1])
        marks.append(now(device))
        terms = method(outputs, targets, pair.labels)
        loss = torch.stack(list(terms.values())).sum()
        marks.append(now(device))
        loss.backward()
        marks.append(now(device))
        optimizer.step()
        marks.append(now(device))
        optimizer.zero_grad()
        names = ("input transforms", "teacher", "encode", "student", "losses", "backward", "update")
        for name, start, end in zip(names, marks, marks[1:], strict=False):
            best[name] = min(best.get(name, float("inf")), 1e3 * (end - start))
    return best
