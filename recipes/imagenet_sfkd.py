"""ImageNet-1K under the literature's protocol (OFA-KD's, arXiv 2310.19444), for CNN and for ViT or MLP students.

    python recipes/imagenet_sfkd.py --data imagenet/ --dry-run                      # plan, batch, steps, time, memory
    accelerate launch recipes/imagenet_sfkd.py --data imagenet/ --output runs/r18 --trackers tensorboard
    accelerate launch recipes/imagenet_sfkd.py --data hf:ILSVRC/imagenet-1k --student timm:deit_tiny_patch16_224
    accelerate launch recipes/imagenet_sfkd.py --data hf:ILSVRC/imagenet-1k --stream --images 1281167 --classes 1000
    accelerate launch recipes/imagenet_sfkd.py --data wds:shards/ --images 1281167 --classes 1000

`--data` is a folder with `train/` and `val/` (one folder of images a class each), a Hugging Face dataset
(`pip install datasets`), downloaded first or streamed, or a folder of WebDataset shards `*train*.tar` and `*val*.tar`.
Crops and flips are made while loading, all other augmentation on the device. Stopped, the same command goes on from its
last checkpoint; on SIGTERM or SIGUSR1, which clusters send before they kill, it writes one.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import psutil
import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from hetkd import Distiller, list_methods, load_model
from hetkd.data import image_transform, load_splits
from hetkd.data.streams import StreamLoader, TrainingStream, open_streams

console = Console(highlight=False, soft_wrap=True)
CNN_PROTOCOL: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 64,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.1,
    "min_lr": 1e-6,
    "weight_decay": 1e-4,
    "scheduler": "step",
    "decay_epochs": 30,
    "decay_rate": 0.1,
    "warmup_epochs": 3,
    "label_smoothing": 0.1,
}
OTHER_PROTOCOL: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 5e-4,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "warmup_epochs": 20,
    "warmup_lr": 5e-7,
    "clip_grad": 5.0,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema": 0.99996,
}


def main() -> None:
    """Train, or tell what a training would be."""
    arguments = parse_arguments()
    streams = open_streams(arguments.data) if arguments.stream else {}
    train, val, names = (None, None, []) if streams else load_splits(arguments.data)
    classes = arguments.classes or len(names)
    torch.manual_seed(arguments.seed)
    weights = arguments.teacher_weights
    teacher: nn.Module = load_model(
        arguments.teacher, weights=weights, **({} if weights is None else {"num_classes": classes})
    )
    student = load_model(arguments.student, pretrained=False, num_classes=classes)
    distiller = Distiller(teacher, student, arguments.method)
    protocol = protocol_of(distiller, arguments)
    if PartialState().is_main_process:
        console.print(f"{distiller.plan}\n")
    if arguments.dry_run:
        tell(distiller, protocol, arguments.images or count_images(train))
        return
    if streams:
        train, val = loaders(streams, distiller, protocol["batch_size"], arguments)
    result = distiller.fit(
        train,
        val,
        output_dir=arguments.output,
        resume=True,
        seed=arguments.seed,
        num_workers=arguments.workers,
        mixed_precision=arguments.mixed_precision,
        unreadable=arguments.unreadable,
        trackers=arguments.trackers,
        **protocol,
    )
    if PartialState().is_main_process:
        console.print(f"{arguments.output}: top-1 {result.history[-1]['top1']:.2f} %, best {result.best['top1']:.2f} %")


def loaders(
    streams: dict[str, Any], distiller: Distiller, batch_size: int, arguments: argparse.Namespace
) -> tuple[TrainingStream, StreamLoader]:
    """Return loaders of both streams, with the transforms that `fit` gives to folders."""
    inputs = distiller.student_inputs
    return (
        TrainingStream(
            streams["train"],
            image_transform(inputs.spec, distiller.loading_size, train=True),
            batch_size=batch_size,
            workers=arguments.workers,
            images=arguments.images,
            seed=arguments.seed,
        ),
        StreamLoader(
            streams["val"],
            image_transform(inputs.spec, inputs.size, train=False),
            batch_size=2 * batch_size,
            workers=arguments.workers,
        ),
    )


def protocol_of(distiller: Distiller, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `fit`: the protocol of the student's family, with what the command line changes."""
    is_cnn = distiller.taps["student"].adapter.family == "CNN"
    protocol = dict(CNN_PROTOCOL if is_cnn else OTHER_PROTOCOL)
    protocol["augment"] = None if is_cnn else device_augmentation()
    if arguments.epochs is not None:
        protocol |= {"epochs": arguments.epochs, "warmup_epochs": min(protocol["warmup_epochs"], arguments.epochs / 5)}
    for name in ("batch_size", "lr", "gradient_accumulation"):
        if getattr(arguments, name) is not None:
            protocol[name] = getattr(arguments, name)
    return protocol


def device_augmentation() -> nn.Module:
    """Return the augmentation of ViT and MLP students beside crops and flips, for batches on the device."""
    return K.AugmentationSequential(
        K.auto.RandAugment(n=2, m=9), K.ColorJitter(0.4, 0.4, 0.4, p=1.0), K.RandomErasing(p=0.25), data_keys=["input"]
    )


def tell(distiller: Distiller, protocol: dict[str, Any], images: int) -> None:
    """Print what a training would be, from a few steps on made-up images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller.to(device).train()
    batch, processes = protocol["batch_size"], PartialState().num_processes
    height, width = distiller.loading_size
    x = torch.rand(batch, 3, height, width, device=device)
    y = torch.randint(distiller.classes or 1, (batch,), device=device)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        distiller(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    accumulation = protocol.get("gradient_accumulation", 1)
    steps = images // (batch * processes)
    hours = min(seconds) * steps * protocol["epochs"] / 3600
    console.print(
        f"{images:,} training images, {protocol['epochs']} epochs\n"
        f"effective batch {batch * processes * accumulation} = {batch} images x {processes} processes x {accumulation} "
        f"accumulated; the learning rate {protocol['lr']:g} is not scaled with it\n"
        f"{steps:,} steps an epoch, {steps * protocol['epochs']:,} in all\n"
        f"about {hours:,.1f} hours at {min(seconds):.3f} s a step on {device} in full precision, if loading keeps up\n"
        f"about {memory / 1e9:.1f} GB of memory a process"
    )


def count_images(train: Any) -> int:
    """Return the number of training images."""
    if isinstance(train, str):
        return sum(1 for path in Path(train).glob("*/*") if path.is_file())
    return len(train)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, hf:NAME, or wds:FOLDER")
    parser.add_argument("--stream", action="store_true", help="read hf:NAME as it comes, without a download first")
    parser.add_argument("--images", type=int, help="of a stream: training images, which tell the length of an epoch")
    parser.add_argument("--classes", type=int, help="of a stream")
    parser.add_argument("--teacher", default="timm:swin_tiny_patch4_window7_224", metavar="NAME")
    parser.add_argument("--teacher-weights", type=Path, metavar="FILE", help="instead of the pretrained ones")
    parser.add_argument("--student", default="timm:resnet18", metavar="NAME")
    parser.add_argument("--method", choices=list_methods("classification"), default="sfkd")
    parser.add_argument("--epochs", type=int, help="instead of the protocol's")
    parser.add_argument("--batch-size", type=int, help="a process, instead of the protocol's")
    parser.add_argument("--gradient-accumulation", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--unreadable", choices=["error", "skip"], default="error")
    parser.add_argument("--trackers", nargs="*", default=[], metavar="NAME", help="tensorboard, wandb, mlflow, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--output", type=Path, default=Path("runs/imagenet"), metavar="DIR")
    arguments = parser.parse_args(words)
    arguments.stream |= arguments.data.startswith("wds:")
    if arguments.stream and not (arguments.images and arguments.classes):
        parser.error("a stream needs --images and --classes, which it does not tell.")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError) as error:
        raise SystemExit(f"imagenet_sfkd.py: {error}") from error
