"""Distils a Hugging Face vision model into a small CNN of timm, on a Hugging Face dataset or a folder, and packs it.

    python recipes/hf_to_cnn.py --teacher google/vit-base-patch16-224 --student resnet18 --dataset imagenet/
    python recipes/hf_to_cnn.py --teacher me/food-vit --student resnet18 --dataset hf:food101 --pixels 160
    accelerate launch recipes/hf_to_cnn.py --teacher ./my-vit --dataset photos/ --push-to-hub me/photos-cnn

A dataset is `hf:NAME` (`pip install datasets`) or a folder with `train/` and `val/`, one folder of images a class
each. Where the teacher knows other classes than the dataset, its features teach alone (`kd_weight=0`), and the
recipe says so. What comes out is a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: the
weights of the best epoch, configuration and a model card. Nothing is uploaded without `--push-to-hub`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from hetkd import Distiller, list_methods, load_model
from hetkd.data import load_splits
from hetkd.models.description import read_description

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Distil, evaluate, pack, and upload if asked to."""
    arguments = parse_arguments()
    train, val, names = load_splits(arguments.dataset)
    teacher = load_model(f"hf:{arguments.teacher}")
    student = load_model(f"timm:{arguments.student}", pretrained=arguments.pretrained_student, num_classes=len(names))
    options = {}
    if teacher_classes(teacher) != len(names):
        options = {"kd_weight": 0.0}
        console.print(
            f"{arguments.teacher} has {teacher_classes(teacher)} classes and {arguments.dataset} {len(names)}: "
            "the teacher's features teach, its logits do not."
        )
    sizes = {"student": arguments.pixels}
    distiller = Distiller(teacher, student, arguments.method, input_size=sizes, **options)
    console.print(f"{distiller.plan}\n")
    distiller.fit(
        train,
        val,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        warmup_epochs=min(5.0, arguments.epochs / 10),
        clip_grad=5.0,
        label_smoothing=0.1,
        mixed_precision=arguments.mixed_precision,
        num_workers=arguments.workers,
        output_dir=arguments.output / "run",
        resume=True,
    )
    if PartialState().is_main_process:
        pack(distiller, arguments)


def teacher_classes(teacher: Any) -> int | None:
    """Return the classes of a Hugging Face model, or ``None`` of one without a classifier."""
    has_classifier = "ForImageClassification" in type(teacher).__name__
    return int(teacher.config.num_labels) if has_classifier else None


def pack(distiller: Distiller, arguments: argparse.Namespace) -> None:
    """Write the folder that timm and the hub take, with the best epoch's student, and upload it if asked to."""
    folder, best = arguments.output / "model", arguments.output / "run" / "best.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    description = read_description(best)
    assert description is not None, "fit wrote it"
    shutil.copyfile(best, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description.timm_configuration(), indent=2) + "\n")
    (folder / "README.md").write_text(f"{description.card()}\n```text\n{distiller.plan}\n```\n", encoding="utf-8")
    top1 = description.made["top1"]
    console.print(f"{folder}: top-1 {top1:.2f} %; timm.create_model('local-dir:{folder}', pretrained=True)")
    if arguments.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(arguments.push_to_hub, private=arguments.private, exist_ok=True)
        api.upload_folder(repo_id=arguments.push_to_hub, folder_path=str(folder))
        console.print(f"uploaded to https://huggingface.co/{arguments.push_to_hub}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="NAME", help="on the hub, or a folder of save_pretrained")
    parser.add_argument("--student", default="mobilenetv3_large_100", help="a timm model")
    parser.add_argument("--pretrained-student", action="store_true", help="start from timm's weights")
    parser.add_argument("--dataset", required=True, metavar="DATA", help="hf:NAME, or a folder with train/ and val/")
    parser.add_argument("--pixels", type=int, help="input size of the student; default: its own")
    parser.add_argument("--method", choices=list_methods("classification"), default="sfkd")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/hf_to_cnn"), metavar="DIR")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the model there")
    parser.add_argument("--private", action="store_true", help="as a private repository")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"hf_to_cnn.py: {error}") from error
