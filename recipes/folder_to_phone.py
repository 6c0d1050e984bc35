"""Your photos, a strong teacher, a student on a phone: every step from a folder to an int8 ONNX file.

    python recipes/folder_to_phone.py                                    # embedded images; 5 minutes on two cores
    python recipes/folder_to_phone.py --photos photos/ --teacher timm:convnext_tiny --student timm:mobilenetv3_small_100
    python recipes/folder_to_phone.py --photos photos/ --teacher timm:tf_efficientnet_lite0 --weights lite0.safetensors

`photos/` holds `train/` and `val/`, one folder of images a class each. Without `--photos` the recipe writes 1,500 of
the quickstart's images as such folders, and takes the quickstart's teacher. The steps: look at the data, fine-tune the
teacher, train the student alone and taught, export it (float and int8), check the files against PyTorch, and name what
is on a picture, by onnxruntime alone.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import nn

import hetkd
from hetkd.data import load_images, load_splits
from hetkd.data.folders import picture_files
from hetkd.models import build_small, load_weights

ASSETS = Path(__file__).parent / "assets"
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
TRAIN_IMAGES, VAL_IMAGES = 100, 50  # a class
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Go the whole way."""
    arguments, start = parse_arguments(), time.perf_counter()
    photos, output = arguments.photos, arguments.output
    model: str | nn.Module = arguments.teacher
    if photos is None:
        photos, model = write_photos(output / "photos"), embedded_teacher()
    train, val = photos / "train", photos / "val"

    alone = make_distiller(None, "ce", arguments)
    if alone.check(train, val).problems:
        raise SystemExit("folder_to_phone.py: mend these problems first, or run again with clean folders.")
    teacher = hetkd.finetune(
        model, train, val, weights=arguments.weights, epochs=arguments.teacher_epochs, output_dir=output, resume=True
    )
    taught = make_distiller(teacher.model, arguments.method, arguments)
    console.print(f"\n{taught.plan}\n")
    for name, distiller in (("alone", alone), ("student", taught)):
        distiller.fit(train, val, output_dir=output / name, resume=True, **training(arguments))
        load_weights(distiller.student, output / name / "best.safetensors")

    student = hetkd.load_student(output / "student" / "best.safetensors")
    exact = hetkd.export(student, output / "student.onnx", images=val)
    small = hetkd.export(student, output / "student-int8.onnx", images=val, calibration=train, int8=True)
    print_table(teacher, {"student alone": alone, "student taught": taught}, {"ONNX": exact, "ONNX, int8": small}, val)
    picture = picture_files(val)[0]
    console.print(f"\n{picture} by onnxruntime alone: {name_by_onnxruntime(output / 'student-int8.onnx', picture)}")
    console.print(f"whole run: {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


def name_by_onnxruntime(file: Path, picture: Path) -> str:
    """Name what is on a picture as a phone would: with the file, and without PyTorch or hetkd."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    _, channels, height, width = session.get_inputs()[0].shape
    image = ImageOps.fit(Image.open(picture).convert("L" if channels == 1 else "RGB"), (width, height))
    pixels = np.asarray(image).reshape(1, height, width, channels).transpose(0, 3, 1, 2)
    (probabilities,) = session.run(None, {"images": pixels})
    best = int(probabilities[0].argmax())
    return f"{classes[best]} ({100 * probabilities[0, best]:.0f} %)"


def make_distiller(teacher: nn.Module | None, method: str, arguments: argparse.Namespace) -> hetkd.Distiller:
    """Build the same student, with the same initial weights, alone or with a teacher."""
    torch.manual_seed(0)
    channels = {"in_chans": 1} if arguments.photos is None else {}
    classes = len(GARMENTS) if arguments.photos is None else len(load_splits(str(arguments.photos)).classes)
    student = hetkd.load_model(
        arguments.student, pretrained=arguments.pretrained_student, num_classes=classes, **channels
    )
    return hetkd.Distiller(teacher, student, method, input_size={"student": arguments.pixels})


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of both students' training."""
    return {
        "epochs": arguments.epochs,
        "batch_size": 32,
        "lr": 2e-3,
        "warmup_epochs": min(2, arguments.epochs / 4),
        "min_crop": 0.7 if arguments.photos is None else 0.35,  # garments fill their pictures
        "num_workers": arguments.workers,
    }


def write_photos(folder: Path) -> Path:
    """Write some of the quickstart's images as folders of classes, as one's own photos would be."""
    assets = ASSETS / "fashion_mnist"
    data = load_images(str(assets) if assets.is_dir() else "fashion-mnist")
    for split, (images, labels), count in (("train", data.train, TRAIN_IMAGES), ("val", data.test, VAL_IMAGES)):
        for label, name in enumerate(GARMENTS):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images[labels == label][:count]):
                Image.fromarray(image[0].numpy()).save(folder / split / name / f"{index:03}.png")
    return folder


def embedded_teacher() -> nn.Module:
    """Return the vision transformer of the quickstart."""
    weights = ASSETS / "vit_fashion_mnist.safetensors"
    if not weights.exists():
        raise SystemExit("folder_to_phone.py: without the assets beside this script, use --photos and --teacher.")
    teacher, _ = build_small("vit", 28, len(GARMENTS), 1)
    load_weights(teacher, weights)
    return teacher


def print_table(
    teacher: hetkd.Finetuned,
    students: dict[str, hetkd.Distiller],
    files: dict[str, hetkd.ExportReport],
    val: Path,
) -> None:
    """Print accuracy, size and speed of all models."""
    table = Table(title="\nvalidation images", title_justify="left")
    for column in ("model", "top-1, %", "MB", "ms an image"):
        table.add_column(column, justify="left" if column == "model" else "right")
    speed = hetkd.bench(teacher.path)
    table.add_row("teacher", f"{teacher.top1:.2f}", f"{speed.megabytes:.1f}", f"{speed.milliseconds:.1f}")
    for name, distiller in students.items():
        speed, top1 = hetkd.bench(distiller), distiller.evaluate(val)["top1"]
        table.add_row(name, f"{top1:.2f}", f"{speed.megabytes:.1f}", f"{speed.milliseconds:.1f}")
    for name, file in files.items():
        top1 = "-" if file.top1 is None else f"{file.top1[1]:.2f}"
        table.add_row(name, top1, f"{file.megabytes:.1f}", f"{file.milliseconds[1]:.1f}")
    console.print(table)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="with train/ and val/; default: embedded images")
    parser.add_argument("--teacher", default="timm:convnext_tiny", metavar="NAME", help="for --photos: timm:, hf: ...")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the teacher, instead of its library's")
    parser.add_argument("--teacher-epochs", type=int, help="default: as hetkd.finetune; 0: its classifier alone")
    parser.add_argument("--student", default="timm:mobilenetv3_small_050", metavar="NAME")
    parser.add_argument("--pretrained-student", action="store_true", help="start from its library's weights")
    parser.add_argument("--pixels", type=int, help="input size of the student; default: 56 for the embedded images")
    parser.add_argument("--method", default="uhkd", choices=hetkd.list_methods("classification"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/folder_to_phone"), metavar="DIR")
    arguments = parser.parse_args(words)
    if arguments.photos is None:
        arguments.pixels = arguments.pixels or 56
        arguments.teacher_epochs = arguments.teacher_epochs or 0
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"folder_to_phone.py: {error}") from error
