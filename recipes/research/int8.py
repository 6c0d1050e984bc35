"""What int8 costs a student, and whether training that knows of it helps: `docs/guides/deploy.md`.

    PYTHONPATH=recipes python recipes/research/int8.py --output runs/int8.jsonl

The ViT of the quickstart teaches a CNN on 5,000 images of Fashion-MNIST. It goes on for some epochs at a low rate, once
in float and once with `hetkd.simulate_int8`; the float file, the int8 file of either and their test accuracies by
onnxruntime are a line each.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compare import ASSETS, load_data
from torch import nn

from hetkd import Distiller, export, load_student, simulate_int8
from hetkd.data import ImageData
from hetkd.models import build_small, load_weights
from hetkd.training.records import git_revision, machine

STUDENTS = ("mobilenetv3_small_050", "efficientnet_lite0", "resnet10t")


def main(words: list[str] | None = None) -> None:
    """Train the students, and write a line for each."""
    arguments = parse_arguments(words)
    data = load_data("fashion", arguments.pixels).first(arguments.images)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for name in arguments.students:
            row = measure(name, seed, data, arguments)
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(", ".join(f"{key} {value}" for key, value in row.items() if key not in ("machine", "git_revision")))


def measure(name: str, seed: int, data: ImageData, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one student in float, then on in float and for int8, and return all accuracies in percent."""
    torch.manual_seed(seed)
    student, size = build_small(name, 2 * data.pixels, data.classes, data.channels)
    options = {"batch_size": 64, "seed": seed, "progress": False, "cpu": True}
    distil(student, size, data).fit(data.train, epochs=arguments.epochs, lr=2e-3, **options)
    before = {key: x.clone() for key, x in student.state_dict().items()}
    row: dict[str, Any] = {"student": name, "seed": seed, **exported("", distil(student, size, data), data)}
    for kind in ("float", "int8"):
        student.load_state_dict(before)
        distiller = distil(simulate_int8(student) if kind == "int8" else student, size, data)
        distiller.fit(data.train, epochs=arguments.more_epochs, lr=2e-4, **options)
        row |= exported(f"after {kind} ", distiller, data)
    return {**row, "epochs": arguments.epochs, "more_epochs": arguments.more_epochs, **about()}


def distil(student: nn.Module, size: int, data: ImageData) -> Distiller:
    """Make a distiller of the quickstart's teacher."""
    teacher, teacher_size = build_small("vit", data.pixels, data.classes, data.channels)
    load_weights(teacher, ASSETS / "vit_fashion_mnist.safetensors")
    return Distiller(teacher, student, "sfkd", input_size={"teacher": teacher_size, "student": size})


def exported(when: str, distiller: Distiller, data: ImageData) -> dict[str, float]:
    """Return the accuracy of a student's float and int8 files on the test images, by onnxruntime."""
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "student.safetensors"
        distiller.save_student(saved)
        files = {"images": data.test, "most_images": len(data.test[1])}
        plain = export(load_student(saved), Path(folder) / "float.onnx", **files)
        small = export(load_student(saved), Path(folder) / "int8.onnx", int8=True, calibration=data.train[0], **files)
    assert plain.top1 is not None
    assert small.top1 is not None
    return {f"{when}float": plain.top1[1], f"{when}int8 file": small.top1[1]}


def about() -> dict[str, Any]:
    """Return where this was measured."""
    return {"machine": machine(), "git_revision": git_revision()}


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--more-epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--pixels", type=int, default=28)
    parser.add_argument("--output", type=Path, default=Path("runs/int8.jsonl"), metavar="FILE")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
