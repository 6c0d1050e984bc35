"""CIFAR-100 as the heterogeneous-distillation literature runs it, and a protocol of our own that fits in an hour.

    python recipes/cifar100.py --finetune swin_t                                  # a teacher, from ImageNet weights
    accelerate launch recipes/cifar100.py --pair swin_t:resnet18 --method sfkd    # 300 epochs at 224 px
    python recipes/cifar100.py --small --pair swin_t:resnet18 --methods ce kd sfkd

The protocol is that of OFA-KD (Hao et al., arXiv 2310.19444): images enlarged to 224 px, 128 a process, 300 epochs,
cosine; CNN students by SGD, ViT and MLP students by AdamW with RandAugment, mixup and cutmix. Its learning rate is
not scaled with processes, so the effective batch (in `settings.json`) belongs to every figure. Methods that compare
stages do so at the blocks of OFA-KD's code (`STAGES`). The paper leaves two things open: here, test images are enlarged
whole, and teachers are fine-tuned by `FINETUNING`.

`--small` takes 10,000 images at their 32 px and small models of the same families, and trains the teacher too; its
figures compare with nothing in print.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from timm.data import create_transform
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from hetkd import Distiller, list_methods, load_model
from hetkd.data import cifar100_split
from hetkd.models import load_weights, save_model
from hetkd.training import FitResult
from hetkd.training.records import PeakMemory, read_rows, row_of, write_rows

PIXELS, CLASSES = 224, 100
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
TEACHERS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "vit_s": "vit_small_patch16_224",
    "mixer_b": "mixer_b16_224",
    "convnext_t": "convnext_tiny",
}
CNN_STUDENTS = {"resnet18": "resnet18", "mobilenetv2": "mobilenetv2_100"}
OTHER_STUDENTS = {"deit_t": "deit_tiny_patch16_224", "swin_p": None, "resmlp_s12": "resmlp_12_224"}
PAIRS = [
    *(f"{teacher}:{student}" for student in CNN_STUDENTS for teacher in ("swin_t", "vit_s", "mixer_b")),
    *(f"{teacher}:{student}" for student in ("deit_t", "swin_p") for teacher in ("convnext_t", "mixer_b")),
    *(f"{teacher}:resmlp_s12" for teacher in ("convnext_t", "swin_t")),
]
BLOCKS = ("blocks.1", "blocks.3", "blocks.9", "blocks.11")  # of 12, in ViT, DeiT, Mixer and ResMLP
STAGES = {
    "convnext_t": ("stages.0", "stages.1", "stages.2", "stages.3"),
    "mobilenetv2": ("blocks.1", "blocks.2", "blocks.4", "bn2"),
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "swin_p": ("layers.0", "layers.1", "layers.2", "layers.3"),
    "swin_t": ("layers.0", "layers.1", "layers.2", "layers.3"),
}
METHODS_AT_STAGES = ("at", "fitnet", "ofa", "sfkd", "uhkd")
CNN_PROTOCOL: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.05,
    "min_lr": 1e-3,
    "weight_decay": 2e-3,
    "warmup_epochs": 3,
    "label_smoothing": 0.1,
}
OTHER_PROTOCOL: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "warmup_epochs": 20,
    "warmup_lr": 5e-7,
    "clip_grad": 5.0,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
}
CNN_AUGMENTATION: dict[str, Any] = {"color_jitter": None}
OTHER_AUGMENTATION: dict[str, Any] = {
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {"ofa": {"feature_weight": 0.1}}
FINETUNING: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.05,
    "warmup_epochs": 2,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.999,
}
SMALL = {
    "swin_t": "swin",
    "vit_s": "vit",
    "mixer_b": "mixer",
    "convnext_t": "convnext",
    "resnet18": "resnet10t",
    "mobilenetv2": "mobilenetv2_050",
    "deit_t": "deit",
    "swin_p": "swin_p",
    "resmlp_s12": "resmlp",
}


class Cifar100(Dataset[tuple[Tensor, int]]):
    """CIFAR-100 as PIL images through a transform of timm, normalised by the literature's mean and deviation.

    Args:
        data: Images uint8 ``[N, 3, 32, 32]`` and labels.
        training: Random crops (0.08 to 1 of the area) and flips, or the whole image.
        **augmentation: Of `timm.data.create_transform`.
    """

    def __init__(self, data: tuple[Tensor, Tensor], *, training: bool, **augmentation: Any) -> None:
        self.images, self.labels = data[0].permute(0, 2, 3, 1).numpy(), data[1].tolist()
        self.transform = create_transform(
            PIXELS, is_training=training, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0, **augmentation
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def main() -> None:
    """Fine-tune a teacher, distil one pair, or hand over to `compare.py`."""
    arguments = parse_arguments()
    if arguments.small:
        script = Path(__file__).with_name("compare.py")
        if not script.exists():
            raise SystemExit(f"cifar100.py: --small hands over to compare.py, which is not in {script.parent}.")
        raise SystemExit(subprocess.call([sys.executable, str(script), *small_words(arguments)]))
    if arguments.finetune:
        finetune(arguments)
    else:
        distil(arguments)


def finetune(arguments: argparse.Namespace) -> None:
    """Fine-tune a teacher from ImageNet weights, and save it."""
    model = build_teacher(arguments.finetune, pretrained=True)
    distiller = Distiller(None, model, "ce", input_size=PIXELS, normalized=(MEAN, STD))
    result = fit(distiller, arguments, FINETUNING, OTHER_AUGMENTATION, arguments.output / arguments.finetune)
    if PartialState().is_main_process:
        path = teacher_weights(arguments, arguments.finetune)
        save_model(distiller.student.half(), path)
        print(f"{path}: top-1 {result.history[-1]['top1']:.2f} %")


def distil(arguments: argparse.Namespace) -> None:
    """Distil one pair by one method under the literature's protocol."""
    teacher_name, student_name = arguments.pair.split(":")
    torch.manual_seed(arguments.seed)
    student = build_student(student_name)
    teacher = None
    if arguments.method != "ce":
        teacher = build_teacher(teacher_name, pretrained=False)
        load_weights(teacher, teacher_weights(arguments, teacher_name))
    options = dict(METHOD_OPTIONS.get(arguments.method, {}))
    if arguments.method in METHODS_AT_STAGES:
        options["stages"] = stages_of(teacher_name, student_name)
    distiller = Distiller(teacher, student, arguments.method, normalized=(MEAN, STD), **options)
    is_cnn = student_name in CNN_STUDENTS
    protocol = dict(CNN_PROTOCOL if is_cnn else OTHER_PROTOCOL)
    augmentation = CNN_AUGMENTATION if is_cnn else OTHER_AUGMENTATION
    name = f"{teacher_name}-{student_name}-{arguments.method}-{arguments.seed}"
    with PeakMemory() as memory:
        result = fit(distiller, arguments, protocol, augmentation, arguments.output / name)
    if PartialState().is_main_process:
        about = {"dataset": "cifar100", "pair": arguments.pair, "method": arguments.method, "seed": arguments.seed}
        row = row_of(distiller, result, memory, about) | {"augmentation": augmentation, "images": arguments.images}
        path = arguments.output / "results.jsonl"
        others = [old for old in read_rows(path) if any(old[key] != value for key, value in about.items())]
        write_rows(path, [*others, row])
        print(f"{arguments.pair} by {arguments.method}: top-1 {row['top1']:.2f} %; {path}")


def fit(
    distiller: Distiller,
    arguments: argparse.Namespace,
    protocol: dict[str, Any],
    augmentation: dict[str, Any],
    folder: Path,
) -> FitResult:
    """Train under a protocol; stopped and started again, it goes on."""
    with PartialState().main_process_first():  # which may download
        train, test = cifar100_split("train"), cifar100_split("test")
    few = slice(None, None, max(1, len(train[1]) // arguments.images)) if arguments.images else slice(None)
    return distiller.fit(
        Cifar100((train[0][few], train[1][few]), training=True, **augmentation),
        Cifar100((test[0][few], test[1][few]), training=False),
        output_dir=folder,
        resume=True,
        seed=arguments.seed,
        num_workers=arguments.workers,
        mixed_precision=arguments.mixed_precision,
        **{
            **protocol,
            **({} if arguments.epochs is None else {"epochs": arguments.epochs, "warmup_epochs": 0}),
            **({} if arguments.batch_size is None else {"batch_size": arguments.batch_size}),
        },
    )


def build_teacher(name: str, *, pretrained: bool) -> nn.Module:
    """Build a teacher by its short name, normalising as CIFAR-100's literature does."""
    overlay = {"mean": MEAN, "std": STD}
    return load_model(
        f"timm:{TEACHERS[name]}", pretrained=pretrained, num_classes=CLASSES, pretrained_cfg_overlay=overlay
    )


def build_student(name: str) -> nn.Module:
    """Build a student by its short name, without weights."""
    overlay = {"mean": MEAN, "std": STD}
    if name == "swin_p":
        model = SwinTransformer(
            embed_dim=48, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=7, num_classes=CLASSES
        )
        model.pretrained_cfg = {"input_size": (3, PIXELS, PIXELS), "mean": MEAN, "std": STD, "classifier": "head.fc"}
        return model
    timm_name = {**CNN_STUDENTS, **OTHER_STUDENTS}[name]
    return load_model(f"timm:{timm_name}", pretrained=False, num_classes=CLASSES, pretrained_cfg_overlay=overlay)


def stages_of(teacher: str, student: str) -> list[tuple[str, str]]:
    """Return the stage pairs of OFA-KD's code."""
    return list(zip(STAGES.get(teacher, BLOCKS), STAGES.get(student, BLOCKS), strict=True))


def teacher_weights(arguments: argparse.Namespace, name: str) -> Path:
    """Return where a fine-tuned teacher's weights are."""
    return Path(arguments.teacher_weights or arguments.output / f"{name}.safetensors")


def small_words(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of `compare.py` for the small protocol."""
    pair = ":".join(SMALL[name] for name in arguments.pair.split(":"))
    epochs, teacher_epochs = (str(arguments.epochs or default) for default in (6, 8))
    return [
        *("--dataset", "cifar100", "--images", str(arguments.images or 10_000), "--pairs", pair),
        *("--methods", *(arguments.methods or ["ce", "kd", arguments.method])),
        *("--seeds", "1", "--epochs", epochs, "--teacher-epochs", teacher_epochs),
        *("--output", str(arguments.output / "small")),
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", choices=PAIRS, default="swin_t:resnet18", metavar="PAIR", help=f"of {', '.join(PAIRS)}"
    )
    parser.add_argument("--method", choices=list_methods("classification"), default="sfkd")
    parser.add_argument("--finetune", choices=TEACHERS, help="fine-tune this teacher instead")
    parser.add_argument("--small", action="store_true", help="the protocol of our own")
    parser.add_argument("--methods", nargs="+", help="of --small: ce, kd and --method without it")
    parser.add_argument("--teacher-weights", type=Path, metavar="FILE", help="default: OUTPUT/TEACHER.safetensors")
    parser.add_argument("--epochs", type=int, help="instead of the protocol's, for a trial")
    parser.add_argument("--images", type=int, help="use about so many training images (and as few test images)")
    parser.add_argument("--batch-size", type=int, help="a process, instead of the protocol's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--output", type=Path, default=Path("runs/cifar100"), metavar="DIR")
    arguments = parser.parse_args(words)
    if arguments.methods and not arguments.small:
        parser.error("--methods is for --small; without it, use --method")
    if arguments.small and arguments.seed:
        parser.error("--small runs seed 0; compare.py runs several")
    return arguments


if __name__ == "__main__":
    main()
