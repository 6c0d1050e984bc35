"""Which architectures of timm, torchvision and Hugging Face can teach and learn; writes docs/research/coverage.md.

    python recipes/research/coverage.py                                     # all of them
    python recipes/research/coverage.py --only "timm:*vit*" --page /tmp/part.md
    python recipes/research/coverage.py --rows runs/coverage.jsonl          # goes on where it was stopped
    python recipes/research/coverage.py --task segmentation                 # writes coverage-segmentation.md there

Each architecture is built without pretrained weights: of timm the smallest variant of each class,
of torchvision every model, of Hugging Face every type, from a small configuration. It takes one step as teacher and one
as student of a small partner, by SFKD and by UHKD, at the smallest of a row of input sizes that it takes.
"""

import argparse
import gc
import json
import math
import resource
import textwrap
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from architectures import CLASSES, SOURCES, Candidate, candidates
from rich.console import Console
from torch import Tensor, nn

from hetkd import SFKD, UHKD, Distiller, DistillerOutput, load_model
from hetkd.features.hooks import is_segmenter, output_logits
from hetkd.features.pairing import choose_stages
from hetkd.models.inputs import input_spec
from hetkd.models.wrappers import tapped_module

SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)

METHODS = {"sfkd": SFKD, "uhkd": UHKD}

PAGES = Path(__file__).parents[2] / "docs" / "research"
FILES = {"classification": "coverage.md", "segmentation": "coverage-segmentation.md"}
TITLES = {"classification": "Which models work", "segmentation": "Which segmenters work"}
MORE = {"classification": "", "segmentation": ", and every decoder of segmentation_models_pytorch on a ResNet18"}
PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "hf": "transformers",
    "smp": "segmentation_models_pytorch",
}

TRIED = (
    "It tries the smallest variant of each class of timm, every model of torchvision, and every type of Hugging Face "
    "in a small configuration{more}. A model works if all terms are finite and not zero, its logits are bit "
    "for bit those of a plain call, and its first layer gets a gradient."
)
MISSING = "**Still missing.** Other variants, pretrained weights, and training beyond one step."

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Row:
    """What was seen of a candidate; ``problems`` is empty where all went well, ``memory`` is the peak so far in GB."""

    library: str
    architecture: str
    name: str
    family: str = ""
    parameters: int = 0
    size: tuple[int, int] = (0, 0)
    stages: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: float = 0.0


def main() -> None:
    """Check each, print a line an architecture, and write the page."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    rows = []
    known = read_rows(arguments.rows)
    for candidate in candidates(arguments.only, arguments.task):
        row = known.get((candidate.library, candidate.name)) or check(candidate)
        rows.append(row)
        report(row)
        if arguments.rows and (candidate.library, candidate.name) not in known:
            with arguments.rows.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(row)) + "\n")
        gc.collect()
    minutes, memory = sum(row.seconds for row in rows) / 60, max((row.memory for row in rows), default=0.0)
    summary = f"{len(rows)} architectures in {minutes:.0f} minutes on {torch.get_num_threads()} threads, "
    summary += f"at most {memory:.1f} GB of memory."
    file = arguments.page or PAGES / FILES[arguments.task]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(rows, summary, arguments.task), encoding="utf-8")
    console.print(f"{summary} Written to {file}.")


def read_rows(path: Path | None) -> dict[tuple[str, str], Row]:
    """Read what an earlier run has done already."""
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row.library, row.name): row for row in rows}


def check(candidate: Candidate) -> Row:
    """Let an architecture be teacher and student, and note what goes wrong."""
    row, start = Row(candidate.library, candidate.architecture, candidate.name), time.perf_counter()
    try:
        model = candidate.build()
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        row.size = smallest_input(model)
        for method in METHODS:
            row.problems += [f"teacher, {method}: {problem}" for problem in check_teacher(row, model, method)]
            row.problems += [f"student, {method}: {problem}" for problem in check_student(row, model, method)]
    except Exception as error:  # whatever a model does, the others go on
        row.problems.append(f"{type(error).__name__}: {error}")
    row.seconds = time.perf_counter() - start
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def smallest_input(model: nn.Module) -> tuple[int, int]:
    """Return the smallest square of `SIZES`, or the model's own size, that it takes in eval and in training mode."""
    own = input_spec(tapped_module(model)).size
    for size in sorted({*((pixels, pixels) for pixels in SIZES), own}):
        try:
            settle_statistics(model, size)
        except (RuntimeError, ValueError) as error:
            if "no spatial features" in str(error):
                raise
            continue
        return size
    settle_statistics(model, own)  # says why not
    raise AssertionError


def settle_statistics(model: nn.Module, size: tuple[int, int]) -> None:
    """Give batch norms the statistics of images: in eval mode, an untrained deep CNN makes all but zeros without."""
    distiller = distil("teacher", model, "sfkd", size)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    images, _ = batch(distiller, size)
    model.train()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        distiller.taps["teacher"].run(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def distil(role: str, model: nn.Module, method: str, size: tuple[int, int]) -> Distiller:
    """Make a distiller of the model in its role and a small partner; without logits where the model has none."""
    partner = small_segmenter() if is_segmenter(model) else small_partner()
    teacher, student = (model, partner) if role == "teacher" else (partner, model)
    try:
        return Distiller(teacher, student, METHODS[method](), input_size={role: size})
    except ValueError as error:
        if "no classifier" not in str(error):
            raise
    label_free = METHODS[method](kd_weight=0, ce_weight=0)
    return Distiller(teacher, student, label_free, input_size={role: size})


def small_partner() -> nn.Module:
    """Build a small ViT of four stages."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=CLASSES
    )


def small_segmenter() -> nn.Module:
    """Build a small CNN of four stages with a decoder."""
    return load_model("timm:test_resnet", pretrained=False, task="segmentation", num_classes=CLASSES)


def check_teacher(row: Row, model: nn.Module, method: str) -> list[str]:
    """Take one step with the model as teacher; its logits must be those of a plain call, bit for bit."""
    distiller = distil("teacher", model, method, row.size)
    tap = distiller.taps["teacher"]
    row.family = tap.adapter.family
    row.stages = [
        f"{stage.name} {stage.channels} x {stage.height} x {stage.width}" for stage in choose_stages(tap.stages)
    ]
    images, labels = batch(distiller, row.size)
    output = distiller(images, labels)
    problems = bad_terms(output)
    if output.teacher_logits is not None:
        with torch.no_grad():
            plain = output_logits(tap.adapter.call(tap.model, tap.prepare(images)))
        if plain is None or not torch.equal(plain, output.teacher_logits):
            problems.append("logits differ from those of a plain call")
    return problems


def check_student(row: Row, model: nn.Module, method: str) -> list[str]:
    """Take one step with the model as student, in training mode; the gradient must reach its first layer."""
    model.requires_grad_(True)
    distiller = distil("student", model, method, row.size).train()
    stem: list[nn.Module] = []
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    handles = [layer.register_forward_hook(lambda module, *_: stem.append(module)) for layer in layers]
    output = distiller(*batch(distiller, row.size))
    for handle in handles:
        handle.remove()
    output.loss.backward()
    gradient = stem[0].weight.grad
    problems = bad_terms(output)
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        problems.append("no finite gradient in the first layer")
    model.zero_grad(set_to_none=True)
    return problems


def bad_terms(output: DistillerOutput) -> list[str]:
    """Name the terms of the loss that are zero or not finite, and missing ones."""
    terms = {name: term.item() for name, term in output.terms.items()}
    problems = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value) or value == 0]
    return problems if any("." in name for name in terms) else [*problems, "no feature term"]


def batch(distiller: Distiller, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Make four smooth random images of different brightness, with labels or masks if the student has classes."""
    brightness = torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None, None, None]
    coarse = brightness * torch.rand(4, distiller.student_inputs.spec.channels, 4, 4)
    images = F.interpolate(coarse, size=size, mode="bilinear")
    masks = torch.randint(CLASSES, (4, *size))
    labels = masks if distiller.task.is_dense else torch.arange(4)
    return images, None if distiller.classes is None else labels


def report(row: Row) -> None:
    """Print a line on an architecture, and one on each problem."""
    name = f"{row.library}:{row.name}"
    console.print(f"{name:48} {row.family:16} {row.size[0]:4} px  {row.seconds:6.1f} s  {len(row.stages)} stages")
    for problem in row.problems:
        console.print(f"    {problem}", style="red")


def page(rows: list[Row], summary: str, task: str) -> str:
    """Write the tables as Markdown: by family, refusals, all."""
    libraries = list(SOURCES[task])
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("hetkd", "torch", *(PACKAGES[library] for library in libraries))
    )
    refused = [row for row in rows if row.problems]
    works = f"{len(rows) - len(refused)} of {len(rows)} architectures work as teacher and as student, under `sfkd` and "
    tried = TRIED.format(more=MORE[task])
    command = f"python recipes/research/coverage.py --task {task}"
    made = f"**How it was made.** `{command}` with {versions}. {summary} {tried}"
    families = sorted({row.family for row in rows if not row.problems}, key=str.lower)
    kinds = {family: [row for row in rows if row.family == family and not row.problems] for family in families}
    lines = [f"# {TITLES[task]}", "", _filled(f"{works}`uhkd`. By family, as their adapter names it:"), ""]
    lines += [f"| family | {' | '.join(libraries)} |", f"|---|{'--:|' * len(libraries)}"]
    for name, of_kind in {**kinds, "refused": refused, "all": rows}.items():
        counts = (str(sum(row.library == library for row in of_kind)) for library in libraries)
        lines.append(f"| {name} | {' | '.join(counts)} |")
    lines += ["", _filled(made), "", _filled(MISSING), "", "## Refused, and why", ""]
    lines += [
        _filled(f"- `{row.library}:{row.name}`: {' '.join('; '.join(row.problems).split())}", "  ") for row in refused
    ] or ["None."]
    lines += [
        "",
        "## All",
        "",
        "| library | architecture | variant | family | input | stages: channels x height x width |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        size, stages = f"{row.size[0]} x {row.size[1]}", ", ".join(row.stages)
        lines.append(f"| {row.library} | {row.architecture} | {row.name} | {row.family} | {size} | {stages} |")
    return "\n".join(lines) + "\n"


def _filled(words: str, indent: str = "") -> str:
    return textwrap.fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help='such as "timm:*vit*"')
    parser.add_argument("--task", choices=list(SOURCES), default="classification")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: in docs/research")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep what is done here, and do not do it again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
