"""Students for other runtimes, checked against PyTorch before a file is left."""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hetkd.data.images import TensorImages, TransformedImages, make_loader
from hetkd.data.samples import images_and_labels
from hetkd.data.survey import spread
from hetkd.distillation import Distillation
from hetkd.runtimes import Deployed, Runner, onnx_runner, pt2_runner, quantize, write_onnx, write_pt2
from hetkd.speed import seconds
from hetkd.student import Student, load_student
from hetkd.utils.checks import whole_number

SUFFIXES = (".onnx", ".pt2")
_BATCH = 32
_TOLERANCE = 1e-3
_LEAST_SAME = 90.0


@dataclass(frozen=True)
class ExportReport:
    """What was measured of an exported student beside the one in PyTorch, on this machine.

    Attributes:
        path: The file.
        megabytes: Its size.
        largest_difference: Between probabilities of both.
        same_top1: Share of the images in percent on which both name the same class.
        top1: In percent, of PyTorch and of the file, where the images have labels; otherwise ``None``.
        milliseconds: An image, of PyTorch and of the file, one at a time.
        images: How many were compared.
    """

    path: Path
    megabytes: float
    largest_difference: float
    same_top1: float
    top1: tuple[float, float] | None
    milliseconds: tuple[float, float]
    images: int

    def __str__(self) -> str:
        """Say it in three lines."""
        top1 = "" if self.top1 is None else f", top-1 {self.top1[1]:.2f} % ({self.top1[0]:.2f} % in PyTorch)"
        return (
            f"{self.path}: {self.megabytes:.2f} MB\n"
            f"{self.images} images: same class on {self.same_top1:.1f} %, probabilities differ by at most "
            f"{self.largest_difference:.2g}{top1}\n"
            f"{self.milliseconds[1]:.2f} ms an image ({self.milliseconds[0]:.2f} ms in PyTorch)"
        )


def export(
    student: Student | Distillation | str | Path,
    path: str | Path,
    *,
    images: Any = None,
    int8: bool = False,
    calibration: Any = None,
    preprocess: bool = True,
    most_images: int = 512,
) -> ExportReport:
    """Export a student, check the file against PyTorch, and only then leave it.

    The graph takes any number of images at the student's input size and answers with probabilities.
    Class names and preprocessing are in the metadata of an ONNX file, and in ``hetkd.json`` within a ``.pt2``.

    Args:
        student: A student of `hetkd.load_student`, its path, or a distiller.
        path: ``FILE.onnx`` (needs ``pip install "hetkd[export]"``) or ``FILE.pt2``.
        images: Pictures on which the file is compared with PyTorch: a folder, a dataset, tensors; with labels both
            accuracies are reported. ``None``: those of ``calibration``, or noise, which proves the graph, not accuracy.
        int8: Quantise weights and activations by onnxruntime; ONNX only.
        calibration: Pictures on which int8 is calibrated; ``None``: ``images``.
        preprocess: Build the normalisation in: the graph takes uint8 ``[B, C, H, W]``, otherwise normalised floats.
        most_images: Number of images used for each of both, evenly spread.

    Returns:
        What was measured.

    Warns:
        RuntimeWarning: If int8 names another class than PyTorch on one image of ten or more.

    Raises:
        ValueError: If the suffix is another, int8 lacks images or is asked of a ``.pt2``, or images are none.
        ImportError: If a package of the extra ``export`` is missing.
        RuntimeError: If the student cannot be exported, or the file's answers differ from PyTorch's.

    Example:
        >>> print(export("student.safetensors", "student.onnx", images="photos/val"))  # doctest: +SKIP
    """
    path = _checked_path(Path(path).expanduser(), images if calibration is None else calibration, int8)
    whole_number("most_images", most_images)
    distillation = _distillation_of(student)
    deployed = copy.deepcopy(Deployed(distillation, preprocess=preprocess)).cpu().eval()
    images = calibration if images is None else images
    batches = [(deployed.inputs(x), y) for x, y in _batches(distillation, images, most_images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        first = batches[0][0]
        with _in_words(distillation):
            write = write_onnx if path.suffix == ".onnx" else write_pt2
            write(deployed, first[:2] if len(first) > 1 else first.repeat(2, 1, 1, 1), draft, distillation)
        if int8:
            others = batches if calibration is None else _batches(distillation, calibration, most_images)
            quantize(draft, [x if calibration is None else deployed.inputs(x) for x, _ in others])
        run = onnx_runner(draft) if path.suffix == ".onnx" else pt2_runner(draft)
        report = _compare(path, draft, deployed, run, batches)
        _judge(report, int8=int8)
        os.replace(draft, path)
    return report


def _judge(report: ExportReport, *, int8: bool) -> None:
    name = report.path.name
    if not int8 and report.largest_difference > _TOLERANCE:
        raise RuntimeError(
            f"{name} answers differently from PyTorch (probabilities differ by {report.largest_difference:.2g}): it "
            "was not written."
        )
    if int8 and report.same_top1 < _LEAST_SAME:
        warnings.warn(
            f"{name} names another class than PyTorch on {100 - report.same_top1:.0f} % of the images: calibrate it on "
            "more of the training pictures (calibration=...), or deploy the float file.",
            RuntimeWarning,
            stacklevel=3,
        )


def _checked_path(path: Path, images: Any, int8: bool) -> Path:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(SUFFIXES)}: 'student.onnx'.")
    if int8 and path.suffix != ".onnx":
        raise ValueError("int8=True is for ONNX: export(student, 'student.onnx', int8=True, images=...).")
    if int8 and images is None:
        raise ValueError("int8=True needs pictures to calibrate on: images='photos/train'.")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f"ONNX needs {error.name}: pip install 'hetkd[export]'.") from error
    return path


def _distillation_of(student: Student | Distillation | str | Path) -> Distillation:
    if isinstance(student, (str, Path)):
        student = load_student(student)
    if isinstance(student, Student):
        return student.distillation
    if not isinstance(student, Distillation):
        raise TypeError(f"student must be a Student, its path or a Distiller, got {type(student).__name__}.")
    return student


def _batches(distillation: Distillation, data: Any, most: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield uint8 images of the student's size, with labels where there are some."""
    spec, size = distillation.student_inputs.spec, distillation.student_inputs.size
    if data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (8, spec.channels, *size)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8), None
        return
    loading: dict[str, Any] = {"batch_size": _BATCH, "num_workers": 0, "make": distillation.task.make_dataset}
    loader = make_loader(data, what="images", spec=spec, size=size, train=False, **loading)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TransformedImages) and distillation.class_names is not None:
        dataset.order_classes(distillation.class_names, "the student", "images")
    if isinstance(dataset, (TransformedImages, TensorImages)):
        loader = _spread_batches(dataset, most)  # not of the first classes alone
    count = 0
    for batch in islice(loader, -(-most // _BATCH)):
        images, labels = images_and_labels(batch)
        images, labels = images[: most - count], None if labels is None else labels[: most - count]
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        if x.shape[-2:] != size:
            x = nn.functional.interpolate(x, size, mode=spec.interpolation, antialias=True)
        count += len(x)
        yield (255 * x.clamp(0, 1)).round().byte(), labels
    if count == 0:
        raise ValueError("images is empty: its loader yields no batch.")


def _spread_batches(dataset: TransformedImages | TensorImages, most: int) -> Iterable[Any]:
    chosen = spread(len(dataset), most)
    if isinstance(dataset, TensorImages):
        return [dataset[chosen[start : start + _BATCH]] for start in range(0, len(chosen), _BATCH)]
    return DataLoader(Subset(dataset, chosen), batch_size=_BATCH, collate_fn=getattr(dataset, "collate", None))


@contextmanager
def _in_words(distillation: Distillation) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"{distillation.student_tap.title} could not be exported ({type(error).__name__}: {reason[0]}). It may as "
            "the other of .onnx and .pt2."
        ) from error


@torch.no_grad()
def _compare(
    path: Path, draft: Path, deployed: Deployed, run: Runner, batches: list[tuple[Tensor, Tensor | None]]
) -> ExportReport:
    """Measure a file against PyTorch, on the CPU."""
    difference, same, right, count, answers = 0.0, 0, [0, 0], 0, 0
    for images, labels in batches:
        ours, theirs = deployed(images), run(images)
        difference = max(difference, float((ours - theirs).abs().max()))
        classes = ours.argmax(1), theirs.argmax(1)
        same, count = same + int((classes[0] == classes[1]).sum()), count + len(images)
        if labels is not None and ours.ndim == 2:
            right = [found + int((of == labels).sum()) for found, of in zip(right, classes, strict=True)]
        answers += classes[0].numel()
    labelled = batches[0][1] is not None and ours.ndim == 2
    one = batches[0][0][:1]
    return ExportReport(
        path,
        draft.stat().st_size / 1e6,
        difference,
        100 * same / answers,
        (100 * right[0] / count, 100 * right[1] / count) if labelled else None,
        (1e3 * seconds(deployed, one), 1e3 * seconds(run, one)),
        count,
    )
