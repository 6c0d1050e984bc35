"""What `dense.py` works on: CamVid, views of it, a teacher and what it says of them, and how students are measured."""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu_teacher import Session
from PIL import Image
from safetensors.torch import load_file, save_file
from study import make_optimizer
from timing import now
from torch import Tensor, nn

from hetkd import Distiller, Features, Segmentation, load_model
from hetkd.methods.common.method import Targets
from hetkd.models import load_weights, save_model
from hetkd.tasks.overlaps import Overlaps
from hetkd.tasks.segmentation import resized

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
IGNORED, SIZE = 11, (240, 320)
TASK = Segmentation(ignore_index=IGNORED)
EDGES = (2, 4, 8, 16)  # pixels to the next edge, at the most
RECORDED_AT_ONCE, EVALUATED_AT_ONCE, TEACHER_BATCH = 32, 16, 16


class Teacher(NamedTuple):
    """A teacher's name, the weights that its encoder starts from, its input size, and its learning rate."""

    name: str
    weights: str
    size: tuple[int, int]
    rate: float

    @property
    def options(self) -> dict[str, Any]:
        """What timm builds its encoder with."""
        return {"img_size": self.size} if "vit" in self.name else {}


TEACHERS = {
    "lite0": Teacher(
        "timm:tf_efficientnet_lite0", "efficientnet_lite0/tf_efficientnet_lite0_timm.safetensors", SIZE, 1e-3
    ),
    "dinov2_s": Teacher(
        "timm:vit_small_patch14_dinov2", "dinov2_vits14/vit_small_patch14_dinov2_fp16.safetensors", (336, 448), 2e-4
    ),
}


class Split(NamedTuple):
    """Images uint8 ``[N, 3, H, W]`` and masks uint8 ``[N, H, W]``, all of one size."""

    images: Tensor
    masks: Tensor


class Views(NamedTuple):
    """Fixed views of the training images, and what the teacher says of them.

    Attributes:
        images: uint8 ``[views, N, 3, *SIZE]``.
        masks: uint8 ``[views, N, *SIZE]``.
        features: By the name of a stage, and of ``logits``: half precision ``[views, N, C, h, w]``.
    """

    images: Tensor
    masks: Tensor
    features: dict[str, Tensor]

    def save(self, file: Path) -> None:
        """Write everything to a file, for the processes that train students."""
        save_file({"images": self.images, "masks": self.masks, **self.features}, file)

    @classmethod
    def load(cls, file: Path, device: torch.device) -> "Views":
        """Read the file that `save` wrote."""
        tensors = load_file(file, device=str(device))
        return cls(tensors.pop("images"), tensors.pop("masks"), tensors)

    def targets(self, distiller: Distiller, view: int, index: Tensor) -> Targets:
        """Return the method's targets for some images."""
        maps = tuple(self.features[name][view, index] for name in distiller.method.teacher_stages())
        return distiller.method.encode(Features(self.features["logits"][view, index], maps, None))


def load_data(arguments: argparse.Namespace, device: torch.device) -> dict[str, Split]:
    """Load CamVid, or as many of its images as asked for, or random ones."""
    splits = ("train", "val", "test")
    if arguments.random:
        return {split: Split(*(x.to(device) for x in random_split(arguments.images or 16))) for split in splits}
    folder = arguments.data / "camvid"
    return {split: Split(*(x.to(device) for x in load_split(folder / split, arguments.images))) for split in splits}


def load_split(folder: Path, most: int | None) -> Split:
    """Read the first so many images and masks of a folder."""
    paths = sorted(folder.glob("*.webp"))[:most]
    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    masks = [torch.from_numpy(np.array(Image.open(path.with_suffix(".png")))) for path in paths]
    return Split(torch.stack(images), torch.stack(masks))


def random_split(count: int, size: tuple[int, int] = (96, 128)) -> Split:
    """Make images of bright stripes, and masks that name them."""
    masks = torch.randint(0, len(CLASSES) + 1, (count, 1, size[1] // 16)).repeat_interleave(16, 2).expand(count, *size)
    return Split((20 * masks[:, None] + torch.randint(30, (count, 3, *size))).byte(), masks.byte().contiguous())


def draw_view(split: Split) -> Split:
    """Crop, flip and colour each image at random as `fit` does, but all of them at once, on their device."""
    from kornia.augmentation import AugmentationSequential, ColorJiggle, RandomHorizontalFlip, RandomResizedCrop

    aspect = SIZE[1] / SIZE[0]
    crop = RandomResizedCrop(SIZE, (0.25, 1.0), (0.75 * aspect, aspect / 0.75), p=1.0, cropping_mode="resample")
    colour = ColorJiggle(0.3, 0.3, 0.3, 0.05, p=1.0)
    transform = AugmentationSequential(crop, RandomHorizontalFlip(), colour, data_keys=["input", "mask"])
    images, masks = transform(split.images.float() / 255, split.masks[:, None].float())
    return Split((255 * images).round().clamp(0, 255).byte(), masks[:, 0].round().byte())


def get_teacher(session: Session, arguments: argparse.Namespace, splits: dict[str, Split]) -> nn.Module:
    """Load the teacher, or train it and save it; write what it is worth."""
    known, start = TEACHERS[arguments.teacher], time.perf_counter()
    kept = arguments.output / f"{teacher_name(arguments)}.safetensors"
    teacher = build_teacher(arguments.teacher)
    teacher.to(session.device, memory_format=torch.channels_last)
    distiller, steps = Distiller(None, teacher, "ce", input_size=known.size, task=TASK), 0
    if kept.exists():
        load_weights(teacher, kept)
    else:
        if not arguments.random:
            whole = load_model(known.name, weights=arguments.data / known.weights, **known.options)
            missing = teacher.encoder.load_state_dict(whole.state_dict(), strict=False).missing_keys
            assert not missing, missing
        steps = fine_tune(session, distiller, splits["train"], known.rate, arguments)
        save_model(teacher, kept)
    seconds = now(session.device) - start
    found = {split: measure(session, distiller, splits[split]) for split in ("val", "test")}
    session.write("teacher", teacher=arguments.teacher, steps=steps, seconds=seconds, recipe=known[2:], **found)
    session.say(
        f"teacher {arguments.teacher}: mIoU {found['val']['miou']:.2f} (val), {found['test']['miou']:.2f} (test) after "
        f"{steps} steps in {seconds:.0f} s"
    )
    return teacher.eval()


def teacher_name(arguments: argparse.Namespace) -> str:
    """Return what a teacher's file is called: one of random images, of some images or of few epochs is another one."""
    images = "random-images" if arguments.random else f"{arguments.images or 'all'}-images"
    return f"{arguments.teacher}-{arguments.teacher_epochs}-epochs-{images}"


def build_teacher(name: str) -> nn.Module:
    """Build a teacher without weights."""
    known = TEACHERS[name]
    return load_model(known.name, task="segmentation", num_classes=len(CLASSES), pretrained=False, **known.options)


def fine_tune(session: Session, distiller: Distiller, train: Split, rate: float, arguments: argparse.Namespace) -> int:
    """Train on new views in every epoch, and return the steps."""
    torch.manual_seed(0)
    in_epoch = max(1, len(train.masks) // TEACHER_BATCH)
    steps = arguments.teacher_epochs * in_epoch
    optimizer, schedule = make_optimizer(distiller, steps, rate)
    distiller.train()
    for _ in range(arguments.teacher_epochs):
        view = draw_view(train)
        order = torch.randperm(len(train.masks)).to(session.device)
        for index in order.split(TEACHER_BATCH)[:in_epoch]:
            with session.autocast():
                loss = distiller(view.images[index], view.masks[index].long()).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return steps


@torch.no_grad()
def record(session: Session, teacher: nn.Module, train: Split, arguments: argparse.Namespace) -> Views:
    """Draw the views, and run the teacher over them at all stages that methods compare for any student."""
    start, size = now(session.device), TEACHERS[arguments.teacher].size
    taps = [
        make_distiller(teacher, build_student(name).to(session.device), size, "fitnet").taps["teacher"]
        for name in arguments.students
    ]
    names = list(dict.fromkeys(name for tap in taps for name in tap.names))
    taps[0].select(names)
    torch.manual_seed(1)
    views, found = [draw_view(train) for _ in range(arguments.views)], dict[str, list[Tensor]]()
    for view in views:
        for part in view.images.split(RECORDED_AT_ONCE):
            with session.autocast():
                features = taps[0].run(part)
            assert features.logits is not None
            for name, x in zip([*names, "logits"], [*features.maps, features.logits], strict=True):
                found.setdefault(name, []).append(x.half())
    together = {name: torch.cat(parts).unflatten(0, (len(views), -1)).contiguous() for name, parts in found.items()}
    finite = all(bool(x[0].isfinite().all()) for x in together.values())
    seconds, size_of_all = now(session.device) - start, sum(x.nbytes for x in together.values())
    session.write("record", stages=names, views=len(views), seconds=seconds, bytes=size_of_all, finite=finite)
    session.say(f"recorded {len(views)} views at {', '.join(names)}: {size_of_all / 2**30:.1f} GiB in {seconds:.0f} s")
    return Views(*(torch.stack(x) for x in zip(*views, strict=True)), together)


def build_student(name: str) -> nn.Module:
    """Build a small timm encoder with the plain decoder, from scratch."""
    student = load_model(f"timm:{name}", task="segmentation", num_classes=len(CLASSES), pretrained=False)
    return student.train().to(memory_format=torch.channels_last)


def make_distiller(
    teacher: nn.Module | None, student: nn.Module, size: tuple[int, int], method: str, **options: Any
) -> Distiller:
    """Make a distiller for a teacher that takes images of ``size``."""
    sizes = {"student": SIZE} if teacher is None else {"teacher": size, "student": SIZE}
    return Distiller(teacher, student, method, input_size=sizes, task=TASK, **options)


@torch.no_grad()
def measure(session: Session, distiller: Distiller, split: Split) -> dict[str, Any]:
    """Return the student's metrics at the masks' own resolution, and its mean IoU by the distance to the next edge."""
    classes, bands = len(CLASSES), len(EDGES) + 1
    pairs = torch.zeros(bands * classes**2, dtype=torch.int64, device=session.device)
    distiller.eval()
    for images, masks in zip(*(x.split(EVALUATED_AT_ONCE) for x in split), strict=True):
        small = F.interpolate(images.float(), SIZE, mode="bilinear").round().byte()
        with session.autocast():
            logits = distiller.predict(small)
        named, true = resized(logits.float(), masks.shape[1:]).argmax(1), masks.long()
        cell = (band_of(masks) * classes + true) * classes + named
        pairs += cell[true != IGNORED].bincount(minlength=len(pairs))
    tables = pairs.view(bands, classes, classes)
    found = overlaps(tables.sum(0))
    return {**found, "edges": [overlaps(table)["miou"] for table in tables]}


def overlaps(pairs: Tensor) -> dict[str, float]:
    """Return the metrics of a table of true and named classes."""
    metric = Overlaps(CLASSES).to(pairs.device)
    metric.update(pairs[None], torch.ones(1, 2, device=pairs.device))
    return {name: value for name, value in metric.compute().items() if name != "loss"}


def band_of(masks: Tensor) -> Tensor:
    """Return by pixel which of `EDGES` its distance to the next edge between classes does not exceed, int64."""
    edge = largest_around(masks, 1) != -largest_around(-masks.float(), 1)
    near = torch.stack([largest_around(edge, reach - 1) > 0 for reach in EDGES])
    return (~near).sum(0)


def largest_around(x: Tensor, reach: int) -> Tensor:
    """Return the largest value in a square around each pixel of ``[B, H, W]``."""
    rows = F.max_pool2d(x.float(), (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(rows, (1, 2 * reach + 1), 1, (0, reach))
