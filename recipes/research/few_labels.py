"""Students of images without labels, then of few labels: `docs/guides/without-labels.md`.

    python few_labels.py --seeds 3 --output few.jsonl
    python few_labels.py --table few.jsonl

The teacher is EfficientNet-Lite0 with ImageNet's weights, which never saw CIFAR-100's labels. 20 classes of CIFAR-100
have 250 images each without labels, and 5, 20 or 100 with. A small CNN learns from the labelled images alone, or first
from all images and the teacher's features, and then from the labelled ones, 600 steps each. Accuracy is measured on
the official test images of the 20 classes. A run that is in the output file is not run again.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from hetkd import Distiller, finetune, load_model
from hetkd.data import cifar100_split
from hetkd.models import build_small
from hetkd.training.records import git_revision, machine, read_rows

CLASSES, UNLABELLED = 20, 250
EPOCHS, VIEWS, PIXELS, STEPS = 20, 4, 96, 600
METHODS = ("alone", "rsd", "fitnet", "uhkd", "sfkd")
LABELS = (5, 20, 100)


@dataclass(frozen=True)
class Job:
    """One student.

    Attributes:
        method: What it learns from images without labels; ``"alone"``: nothing.
        labels: Labelled images a class.
        seed: Of its weights and the order of images.
    """

    method: str
    labels: int
    seed: int


class Pictures(Dataset[Any]):
    """Images, with labels or without, as PIL images, which `fit` crops at random."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        if labels is not None:
            self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        picture = to_pil_image(self.images[index])
        return picture if self.labels is None else (picture, int(self.labels[index]))


def main() -> None:
    """Train what is not in the output file yet, or print the table of one."""
    arguments = parse_arguments()
    if arguments.table is not None:
        print(table(read_rows(arguments.table)))
        return
    done = {json.dumps(row["job"], sort_keys=True) for row in read_rows(arguments.output)}
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            jobs = [Job(method, labels, seed) for labels in arguments.labels]
            jobs = [job for job in jobs if json.dumps(asdict(job), sort_keys=True) not in done]
            if jobs:
                train(jobs, arguments)


def train(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Train a student without labels once, then with each number of labels; add a line each."""
    method, seed = jobs[0].method, jobs[0].seed
    images, labels = of_some_classes("train")
    test = of_some_classes("test")
    torch.manual_seed(seed)
    student, size = build_small("resnet_slim", 32, CLASSES, 3)
    agreement = None
    if method != "alone":
        options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 0.0}
        distiller = Distiller(
            load_teacher(), student, method, input_size={"teacher": PIXELS, "student": size}, **options
        )
        cache = arguments.caches / method
        distiller.cache_teacher(Pictures(images), cache, views=VIEWS, min_crop=0.35, progress=False)
        result = distiller.fit(
            Pictures(images),
            test,
            teacher_cache=cache,
            epochs=EPOCHS,
            eval_every=EPOCHS,
            lr=2e-3,
            warmup_epochs=2,
            seed=seed,
        )
        agreement = result.history[-1]["agreement"]
    before = {name: x.clone() for name, x in student.state_dict().items()}
    for job in jobs:
        student.load_state_dict(before)
        few = torch.cat([(labels == label).nonzero()[: job.labels, 0] for label in range(CLASSES)])
        learn = learn_from_scratch if method == "alone" else learn_labels
        top1 = learn(student, size, Pictures(images[few], labels[few]), test, seed)
        row = {
            "job": asdict(job),
            "test": top1,
            "agreement": agreement,
            "git_revision": git_revision(),
            "machine": machine(),
        }
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{job}: {top1:.2f} %", flush=True)


def learn_labels(student: nn.Module, size: int, few: Pictures, test: Any, seed: int) -> float:
    """Fine-tune on the labelled images, and return top-1 on the test images: those never choose."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"input_size": size, "output_dir": folder, "progress": False, "seed": seed}
        batch = min(32, len(few))
        found = finetune(
            student, few, max_steps=STEPS, epochs=STEPS, batch_size=batch, lr=1e-3, layer_decay=1.0, **options
        )
    return Distiller(None, found.model, "ce", input_size=size).evaluate(test)["top1"]


def learn_from_scratch(student: nn.Module, size: int, few: Pictures, test: Any, seed: int) -> float:
    """Train on the labelled images, as many steps, and return top-1 on the test images."""
    distiller = Distiller(None, student, "ce", input_size=size)
    options: Any = {"lr": 2e-3, "label_smoothing": 0.1, "min_crop": 0.35, "seed": seed, "progress": False}
    distiller.fit(few, max_steps=STEPS, batch_size=min(32, len(few)), **options)
    return distiller.evaluate(test)["top1"]


def of_some_classes(split: str) -> tuple[Tensor, Tensor]:
    """Return images and labels of the first 20 classes, of the training images 250 each."""
    images, labels = cifar100_split(split)
    count = UNLABELLED if split == "train" else len(labels)
    chosen = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(CLASSES)])
    return images[chosen], labels[chosen]


def load_teacher() -> nn.Module:
    """Load EfficientNet-Lite0 with ImageNet's weights, from $HETKD_DATA or the hub."""
    folder = Path(os.environ.get("HETKD_DATA", "")) / "efficientnet_lite0"
    files = sorted(folder.glob("*.safetensors"))
    return load_model("timm:tf_efficientnet_lite0", weights=files[0] if files else None)


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation of the test accuracy as a Markdown table."""
    counts = sorted({row["job"]["labels"] for row in rows})
    lines = ["| learnt without labels by | " + " | ".join(f"{n} labels a class" for n in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for method in dict.fromkeys(row["job"]["method"] for row in rows):
        cells = []
        for count in counts:
            scores = [row["test"] for row in rows if row["job"]["method"] == method and row["job"]["labels"] == count]
            values = torch.tensor(scores or [float("nan")])
            spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--caches", type=Path, default=Path("runs/few_labels"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("runs/few_labels.jsonl"), metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an output file")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
