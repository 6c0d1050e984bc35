"""The main job in one command: a vision transformer teaches a small CNN on real images.

    python recipes/quickstart.py                  # at most 5 minutes on two cores
    python recipes/quickstart.py --seeds 3        # mean and spread over three seeds

A ViT trained on Fashion-MNIST teaches a small timm CNN that sees 5,000 of its images. The same
student is trained alone, with KD, with UHKD and with SFKD, under one budget and the same seeds.
"""

import argparse
import statistics
import time
from pathlib import Path

import kornia.augmentation as K
import timm
import torch
from curves import draw_curves
from fashion import CLASSES, SUBSET, build_teacher, read_split
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hetkd import Distiller, list_methods, load_model

PIXELS = 56
COMPARED = {"ce": "alone", "kd": "KD", "uhkd": "UHKD", "sfkd": "SFKD"}
console = Console(highlight=False, soft_wrap=True)
Data = tuple[Tensor, Tensor]


def main() -> None:
    """Trains, compares, saves, loads again."""
    arguments = parse_arguments()
    start = time.perf_counter()
    train, test = (tuple(x[: arguments.images] for x in read_split(SUBSET, split)) for split in ("train", "t10k"))
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    teacher = build_teacher(trained=True)
    console.print(f"Fashion-MNIST: {len(train[0]):,} training and {len(test[0]):,} test images of 28 x 28 pixels\n")

    methods = dict.fromkeys([*COMPARED, arguments.method])
    runs: dict[str, list[list[float]]] = {method: [] for method in methods}
    saved: Distiller | None = None
    for seed in range(arguments.seeds):
        for method in methods:
            distiller = make_distiller(teacher, arguments.student, method, seed)
            if seed == 0:
                console.print(f"{distiller.plan}\n" if method == arguments.method else f"{distiller.plan.title}")
            runs[method].append(train_student(distiller, train, test, arguments.epochs, seed))
            if method == arguments.method and seed == 0:
                saved = distiller
    assert saved is not None

    print_accuracies(runs, evaluate_teacher(teacher, test))
    print_models(teacher, saved.student)
    path = output / "student.safetensors"
    saved.save_student(path)
    accuracy = accuracy_in_plain_timm(arguments.student, path, test)
    console.print(f"\nstudent trained with {arguments.method}: {path}; loaded again in plain timm: {accuracy:.2f} %")
    picture = output / "learning_curves.png"
    means = {label(method): [statistics.mean(epoch) for epoch in zip(*runs[method], strict=True)] for method in runs}
    draw_curves(means, f"{arguments.student} taught by a ViT", "test top-1, %", picture)
    console.print(f"learning curves: {picture}")
    console.print(f"whole run: {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sfkd", choices=list_methods(), help="method of the student that is saved")
    parser.add_argument("--student", default="mobilenetv3_small_050", help="any timm model that takes one channel")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, help="of each split, instead of all")
    parser.add_argument("--seeds", type=int, default=1, help="runs a method; more than one give mean and spread")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    return arguments


def make_distiller(teacher: nn.Module, student: str, method: str, seed: int) -> Distiller:
    """Builds the same student, with the same initial weights, for every method."""
    torch.manual_seed(seed)
    model = load_model(student, pretrained=False, num_classes=len(CLASSES), in_chans=1)
    return Distiller(teacher, model, method, input_size=PIXELS)


def train_student(distiller: Distiller, train: Data, test: Data, epochs: int, seed: int) -> list[float]:
    """Trains under the one budget of this recipe and returns the test accuracy after each epoch."""
    result = distiller.fit(
        train,
        test,
        epochs=epochs,
        batch_size=64,
        lr=2e-3,
        warmup_epochs=0.5,
        augment=K.RandomHorizontalFlip(p=0.5),
        seed=seed,
    )
    return [record["top1"] for record in result.history]


def label(method: str) -> str:
    """Returns a method's name in the table."""
    return COMPARED.get(method, method)


def evaluate_teacher(teacher: nn.Module, test: Data) -> float:
    """Returns the teacher's accuracy on the same test images."""
    return Distiller(None, teacher, method="ce").evaluate(test)["top1"]


def print_accuracies(runs: dict[str, list[list[float]]], teacher: float) -> None:
    """Prints accuracy after the last epoch, and the gain over the student alone, paired by seed."""
    table = Table(title="\ntest top-1 after the last epoch, %", title_justify="left")
    for column in ("method", "mean", "spread", "gain over alone", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    alone = [run[-1] for run in runs["ce"]]
    for method, curves in runs.items():
        last = [run[-1] for run in curves]
        gain = statistics.mean(a - b for a, b in zip(last, alone, strict=True))
        spread = f"{statistics.stdev(last):.2f}" if len(last) > 1 else "-"
        row = [label(method), f"{statistics.mean(last):.2f}", spread, f"{gain:+.2f}", str(len(last))]
        table.add_row(*row)
    table.add_section()
    table.add_row("teacher", f"{teacher:.2f}", "", "", "")
    console.print(table)
    behind = [label(m) for m in runs if m != "ce" and statistics.mean(r[-1] for r in runs[m]) <= statistics.mean(alone)]
    if behind:
        console.print(f"No gain here over the student alone: {', '.join(behind)}.")


def print_models(teacher: nn.Module, student: nn.Module) -> None:
    """Prints sizes and speeds of both models."""
    table = Table(title="\nmodels", title_justify="left")
    for column in ("model", "parameters", "input", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model, pixels in (("teacher", teacher, 28), ("student", student, PIXELS)):
        parameters = sum(p.numel() for p in model.parameters())
        table.add_row(name, f"{parameters / 1e6:.2f} M", f"{pixels} x {pixels}", f"{speed(model, pixels):,.0f}")
    console.print(table)


def speed(model: nn.Module, pixels: int, batch: int = 128, repeats: int = 5) -> float:
    """Returns images a second in inference on the CPU: the median of a few batches."""
    images = torch.rand(batch, 1, pixels, pixels)
    model = model.cpu().eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def accuracy_in_plain_timm(name: str, path: Path, test: Data) -> float:
    """Evaluates the saved student with nothing but timm and torch, as a deployment would."""
    model = timm.create_model(name, num_classes=len(CLASSES), in_chans=1, checkpoint_path=str(path)).eval()
    mean, std = (statistics.mean(model.pretrained_cfg[key]) for key in ("mean", "std"))
    images = nn.functional.interpolate(
        test[0].float() / 255, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False, antialias=True
    )
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in ((images - mean) / std).split(250)])
    return 100 * (logits.argmax(1) == test[1]).float().mean().item()


if __name__ == "__main__":
    main()
