"""Distils a Hugging Face vision model into a small CNN of timm, on a Hugging Face dataset or a folder, and packs it.

    python recipes/hf_to_cnn.py --teacher google/vit-base-patch16-224 --student resnet18 --dataset imagenet/
    python recipes/hf_to_cnn.py --teacher me/food-vit --student resnet18 --dataset hf:food101 --epochs 30
    accelerate launch recipes/hf_to_cnn.py --teacher ./my-vit --dataset photos/ --push-to-hub me/photos-cnn

A dataset is `hf:NAME` (`pip install datasets`) or a folder with `train/` and `val/`, one folder of images a class
each. Where the teacher knows other classes than the dataset, its features teach alone (`kd_weight=0`), and the
recipe says so. What comes out is a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads:
weights, configuration and a model card. Nothing is uploaded without `--push-to-hub`.
"""

import argparse
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from timm.models import save_for_hf
from torch import nn

from hetkd import Distiller, list_methods, load_model
from hetkd.data import load_splits
from hetkd.training import FitResult

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Distil, evaluate, pack, and upload if asked to."""
    arguments = parse_arguments()
    try:
        train, val, names = load_splits(arguments.dataset)
    except (ImportError, ValueError) as error:
        raise SystemExit(f"hf_to_cnn.py: --dataset {error}") from error
    teacher = load_model(f"hf:{arguments.teacher}")
    student = load_model(f"timm:{arguments.student}", pretrained=arguments.pretrained_student, num_classes=len(names))
    options = {}
    if teacher_classes(teacher) != len(names):
        options = {"kd_weight": 0.0}
        console.print(
            f"{arguments.teacher} has {teacher_classes(teacher)} classes and {arguments.dataset} {len(names)}: "
            "the teacher's features teach, its logits do not."
        )
    distiller = Distiller(teacher, student, arguments.method, **options)
    console.print(f"{distiller.plan}\n")
    result = distiller.fit(
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
        pack(distiller, result, names, arguments)


def teacher_classes(teacher: Any) -> int | None:
    """Return the classes of a Hugging Face model, or ``None`` of one without a classifier."""
    has_classifier = "ForImageClassification" in type(teacher).__name__
    return int(teacher.config.num_labels) if has_classifier else None


def pack(distiller: Distiller, result: FitResult, names: list[str], arguments: argparse.Namespace) -> None:
    """Write the folder that timm and the hub take, and upload it if asked to."""
    folder = arguments.output / "model"
    student: nn.Module = distiller.student.cpu().eval()
    save_for_hf(student, folder, model_config={"label_names": names}, safe_serialization=True)
    (folder / "README.md").write_text(model_card(distiller, result, names, arguments), encoding="utf-8")
    console.print(
        f"{folder}: top-1 {result.history[-1]['top1']:.2f} %; timm.create_model('local-dir:{folder}', pretrained=True)"
    )
    if arguments.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(arguments.push_to_hub, private=arguments.private, exist_ok=True)
        api.upload_folder(repo_id=arguments.push_to_hub, folder_path=str(folder))
        console.print(f"uploaded to https://huggingface.co/{arguments.push_to_hub}")


def model_card(distiller: Distiller, result: FitResult, names: list[str], arguments: argparse.Namespace) -> str:
    """Return what a person who finds the model needs to know."""
    last, size = result.history[-1], distiller.taps["student"].size
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"""---
tags: [image-classification, timm, hetkd]
library_name: timm
---
# {arguments.student}, taught by {arguments.teacher}

| | |
|---|---|
| data | {arguments.dataset}, {len(names)} classes: {listed} |
| input | {size[0]} x {size[1]} pixels |
| parameters | {sum(p.numel() for p in distiller.student.parameters()):,} |
| method | {distiller.method.title} (hetkd), {len(result.history)} epochs |
| validation top-1 / top-5 | {last["top1"]:.2f} / {last["top5"]:.2f} % |

```text
{distiller.plan}
```
"""


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="NAME", help="on the hub, or a folder of save_pretrained")
    parser.add_argument("--student", default="mobilenetv3_large_100", help="a timm model")
    parser.add_argument("--pretrained-student", action="store_true", help="start from timm's weights")
    parser.add_argument("--dataset", required=True, metavar="DATA", help="hf:NAME, or a folder with train/ and val/")
    parser.add_argument("--method", choices=list_methods(), default="sfkd")
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
    main()
