"""The Python API from a shell: every flag is an option of the function of that name.

python -m hetkd finetune timm:convnext_tiny photos/train photos/val
python -m hetkd check runs/teachers/convnext_tiny.safetensors timm:resnet18 photos/train photos/val
python -m hetkd distil hf:google/vit-base-patch16-224 timm:resnet18 photos/train photos/val --epochs 30
python -m hetkd evaluate runs/r18/best.safetensors photos/val
python -m hetkd predict runs/r18/best.safetensors photo.jpg
python -m hetkd export runs/r18/best.safetensors r18.onnx --images photos/val --int8
python -m hetkd bench runs/r18/best.safetensors
python -m hetkd models "timm:*mobile*"
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from hetkd.benchmarking import bench
from hetkd.deploy import export
from hetkd.distiller import Distiller
from hetkd.finetuning import finetune
from hetkd.methods import list_methods
from hetkd.methods.common.method import methods
from hetkd.models.load import list_models
from hetkd.student import PredictedMask, load_student
from hetkd.training.options import TrainingOptions
from hetkd.utils.docstrings import described

_SHOWN = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""Errors whose message is for a person; the others are faults, and come with their traceback."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status; ``words`` stand for the command line."""
    arguments = vars(parser(list(sys.argv[1:] if words is None else words)).parse_args(words))
    run: Callable[..., int | None] = arguments.pop("run")
    try:
        status = run(**arguments)
    except _SHOWN as error:
        print(f"hetkd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status or 0


def distil(teacher: str, student: str, train: str, val: str | None, method: str, **options: Any) -> None:
    """Train a student by a teacher; files go to ``runs/STUDENT`` unless told otherwise, for nothing is lost then."""
    options.setdefault("output_dir", "runs/" + re.sub(r"[^-.\w]", "_", student))
    of_fit = {*_signature(Distiller.fit), *_signature(TrainingOptions)}
    for_fit = {name: options.pop(name) for name in list(options) if name in of_fit}
    distiller = Distiller(teacher, student, method, **options)
    print(f"{distiller.plan}\n")
    result = distiller.fit(train, val, **for_fit)
    if result.output_dir is not None:
        print(f"{result.output_dir}/best.safetensors: python -m hetkd predict, export or evaluate it")


def check(teacher: str, student: str, train: str, val: str | None, method: str, **options: Any) -> int:
    """Look at data and models before training; the exit status is 1 if there is a problem."""
    of_check = _signature(Distiller.check)
    for_check = {name: options.pop(name) for name in list(options) if name in of_check}
    return int(bool(Distiller(teacher, student, method, **options).check(train, val, **for_check).problems))


def evaluate(student: str, data: str, **options: Any) -> None:
    """Measure a saved student."""
    loaded = load_student(student)
    distiller = Distiller(None, loaded.model, "ce")
    distiller.class_names = loaded.distillation.class_names
    found = distiller.evaluate(data, **options)
    if "top1" in found:
        print(f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}")
    else:
        print("\n".join(f"{name} {value:.4f}" for name, value in found.items()))


def predict(student: str, images: list[str], top: int) -> None:
    """Name what is on pictures."""
    loaded = load_student(student)
    for image in images:
        found = loaded.predict(image, top=top)
        for one in found if isinstance(found, list) else [found]:
            shares = list(one.shares.items())[:top] if isinstance(one, PredictedMask) else one.top
            print(one.image, *(f"{label} {100 * share:.1f} %" for label, share in shares), sep="  ")


def _finetune(model: str, train: str, val: str | None, **options: Any) -> None:
    finetune(model, train, val, **options)


def _bench(model: str, **options: Any) -> None:
    print(bench(model, **options))


def _export(student: str, path: str, **options: Any) -> None:
    print(export(student, path, **options))


def _models(pattern: str) -> None:
    print("\n".join(list_models(pattern)))


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all commands; ``words`` say whose method's options there are, SFKD's if none."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("hetkd", description=__doc__, formatter_class=raw)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int | None], words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words)
        made.set_defaults(run=run)
        return made

    method = next((b for a, b in pairwise(words) if a == "--method" and b in methods.names()), "sfkd")
    for name, run, summary in (
        ("check", check, "look at data and models before training"),
        ("distil", distil, "train a student by a teacher"),
    ):
        one = command(name, run, summary)
        for argument in ("teacher", "student", "train"):
            one.add_argument(argument)
        one.add_argument("val", nargs="?")
        one.add_argument("--method", default="sfkd", choices=list_methods())
        if name == "check":
            _add_options(one, Distiller.check, ("train", "val"))
        else:
            _add_options(one, Distiller.fit, ("train", "val", "options"))
            _add_options(one, TrainingOptions, ("callbacks",))
        _add_options(one, Distiller, ("teacher", "student", "method", "method_options"))
        _add_options(one, methods[method])

    one = command("finetune", _finetune, "fine-tune a teacher on your own classes")
    for argument in ("model", "train"):
        one.add_argument(argument)
    one.add_argument("val", nargs="?")
    _add_options(one, finetune, ("model", "train", "val", "options"))
    _add_options(one, TrainingOptions, ("callbacks",))

    one = command("evaluate", evaluate, "measure a saved student")
    one.add_argument("student", help="FILE.safetensors, or a directory of a Hugging Face model")
    one.add_argument("data", help="a folder with one folder of images a class")
    _add_options(one, Distiller.evaluate, ("data",))

    one = command("predict", predict, "name what is on pictures")
    one.add_argument("student", help="FILE.safetensors, or a directory of a Hugging Face model")
    one.add_argument("images", nargs="+", metavar="IMAGE", help="pictures or folders")
    one.add_argument("--top", type=int, default=5, help="classes to name")

    one = command("export", _export, "write a saved student for other runtimes")
    one.add_argument("student", help="FILE.safetensors, or a directory of a Hugging Face model")
    one.add_argument("path", help="FILE.onnx or FILE.pt2")
    _add_options(one, export, ("student", "path"))

    one = command("bench", _bench, "measure size and speed of a model on this machine")
    one.add_argument("model", help="FILE.safetensors, a directory of a Hugging Face model, or a name")
    _add_options(one, bench, ("model",))

    one = command("models", _models, "list the names of models")
    one.add_argument("pattern", nargs="?", default="*", help="with * and ?, as in 'timm:*mobile*'")
    return whole


def _signature(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _add_options(parser: argparse.ArgumentParser, function: Any, without: Sequence[str] = ()) -> None:
    """Add a flag for each parameter of a function or class, with the words of its docstring."""
    descriptions = described(function)
    group = parser.add_argument_group(getattr(function, "__qualname__", "options").replace("_", " "))
    for name, parameter in _signature(function).items():
        if name in ("self", *without):
            continue
        flag, words = f"--{name.replace('_', '-')}", descriptions.get(name, "").replace("``", "").replace("%", "%%")
        if isinstance(parameter.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=words)
            continue
        needed = parameter.default is parameter.empty
        read = _text if _is_text(parameter.annotation) else _value
        group.add_argument(flag, type=read, required=needed, default=argparse.SUPPRESS, metavar="VALUE", help=words)


def _is_text(annotation: Any) -> bool:
    """Say whether an option is a text or a path, which may look like a number: ``--output-dir 2024_01``."""
    kinds = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return {kind.strip() for kind in kinds.split("|")} <= {"str", "Path", "pathlib.Path", "Any", "typing.Any", "None"}


def _text(text: str) -> str | None:
    return None if text == "None" else text


def _value(text: str) -> Any:
    """Read a number, a list, ``None`` or the like as Python does, and anything else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
