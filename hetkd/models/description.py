"""What a saved model says of itself: enough to build it again, to prepare its images, and to name its answers."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hetkd.models.inputs import InputSpec, input_spec
from hetkd.models.labels import model_labels

KEY = "hetkd"
"""The entry of a safetensors file's metadata that holds a description, as JSON."""
BUILT_FROM = "built_from"
"""The attribute in which `hetkd.load_model` keeps what it was called with."""


@dataclass(frozen=True)
class Description:
    """What a file of weights says of its model.

    Attributes:
        name: As for `hetkd.load_model`; ``None`` for a module that only its own code can build.
        options: For `hetkd.load_model` too: ``num_classes``, ``in_chans``, ``img_size``, ...
        size: Height and width in pixels of the images that it was trained on.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
        crop_ratio: See `InputSpec`.
        reversed_channels: See `InputSpec`.
        classes: Names of the classes in the order of the logits, if they are known.
        made: How it was made, in words and numbers: method, teacher, accuracy, versions.
    """

    name: str | None
    options: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_ratio: float | None
    reversed_channels: bool
    classes: list[str] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def input_settings(self, source: str) -> dict[str, Any]:
        """Return what `hetkd.models.inputs.input_spec` and `model_labels` read from a model's ``input_settings``."""
        names = ("size", "mean", "std", "interpolation", "crop_ratio", "reversed_channels")
        return {**{name: getattr(self, name) for name in names}, "categories": self.classes, "source": source}

    def timm_configuration(self) -> dict[str, Any]:
        """Return the same in the words of timm's ``config.json``."""
        ratio = 1.0 if self.crop_ratio is None else self.crop_ratio
        pretrained: dict[str, Any] = {
            "input_size": [len(self.mean), *self.size],
            "fixed_input_size": "img_size" in self.options,
            "interpolation": self.interpolation,
            "crop_pct": ratio,
            "crop_mode": "squash" if self.crop_ratio is None else "center",
            "mean": list(self.mean),
            "std": list(self.std),
            "num_classes": self.options.get("num_classes"),
        }
        if self.classes:
            pretrained["label_names"] = self.classes
        architecture = (self.name or "").removeprefix("timm:")
        model_args = {name: value for name, value in self.options.items() if name not in ("num_classes", "in_chans")}
        return {
            "architecture": architecture,
            "num_classes": self.options.get("num_classes"),
            **({"model_args": model_args} if model_args else {}),
            "pretrained_cfg": pretrained,
            "hetkd": self.made,
        }

    def card(self) -> str:
        """Return a model card in Markdown, with the front matter that Hugging Face's hub reads."""
        library = "transformers" if self.name == "hf:" else (self.name or "").partition(":")[0] or "pytorch"
        made = self.made
        classes = self.classes or []
        rows = {
            "architecture": self.options.get("class") or (self.name or "").rpartition(":")[2],
            "input": f"{self.size[1]} x {self.size[0]} pixels, mean {_numbers(self.mean)}, std {_numbers(self.std)}",
            "classes": f"{len(classes)}: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}" if classes else "",
            "how it was made": made.get("plan") or ("fine-tuned" if "finetuned" in made else ""),
            "epochs": made.get("epochs"),
            "training images": made.get("train_images"),
            "validation top-1 / top-5, %": _accuracies(made),
            "validation mIoU, %": f"{made['miou']:.2f}" if isinstance(made.get("miou"), float) else "",
            "hetkd": made.get("hetkd"),
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
        is_segmenter = self.options.get("task") == "segmentation" or "Segmentation" in str(
            self.options.get("class", "")
        )
        task = "image-segmentation" if is_segmenter else "image-classification"
        front = [f"tags: [{task}, {library}, hetkd]", f"library_name: {library}", f"pipeline_tag: {task}"]
        return "---\n" + "\n".join(front) + f"\n---\n# {rows['architecture']}\n\n| | |\n|---|---|\n{table}\n"

    def image_processor(self) -> dict[str, Any]:
        """Return the same as Hugging Face's ``preprocessor_config.json``."""
        height, width = self.size
        common = {
            "do_resize": True,
            "resample": 3 if self.interpolation == "bicubic" else 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        exact = {"height": height, "width": width}
        if self.crop_ratio is None:
            return {"image_processor_type": "ViTImageProcessor", **common, "size": exact}
        edge = {"shortest_edge": math.floor(max(self.size) / self.crop_ratio)}
        crop = {"do_center_crop": True, "crop_size": exact}
        return {"image_processor_type": "CLIPImageProcessor", **common, "size": edge, **crop, "do_convert_rgb": True}

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), default=str)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _accuracies(made: dict[str, Any]) -> str:
    return " / ".join(f"{made[name]:.2f}" for name in ("top1", "top5") if isinstance(made.get(name), float))


def describe(
    model: Any,
    *,
    size: tuple[int, int] | None = None,
    spec: InputSpec | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    made: dict[str, Any] | None = None,
) -> Description:
    """Describe a model.

    Args:
        model: A plain module.
        size: Height and width in pixels that it was trained on; ``None``: its own.
        spec: What its images go through; ``None``: its own.
        num_classes: Of its head; ``None``: what it was built with.
        classes: Names of its classes; ``None``: those that it knows.
        made: See `Description`.
    """
    spec = spec or input_spec(model)
    name, options = _built_from(model, spec)
    if num_classes is not None and name not in (None, "hf:"):
        options["num_classes"] = num_classes
    if classes is None:
        labels = model_labels(model, options.get("num_classes"))
        classes = [names[0] for names in labels.names] if labels is not None and labels.certain else None
    return Description(
        name,
        options,
        size or spec.size,
        spec.mean,
        spec.std,
        spec.interpolation,
        spec.crop_ratio,
        spec.reversed_channels,
        None if classes is None else list(classes),
        made or {},
    )


def _built_from(model: Any, spec: InputSpec) -> tuple[str | None, dict[str, Any]]:
    """Return name and options with which `hetkd.load_model` builds a model like this."""
    built = getattr(model, BUILT_FROM, None)
    if hasattr(getattr(model, "config", None), "model_type"):
        return "hf:", {"class": type(model).__name__, "config": json.loads(model.config.to_json_string(use_diff=False))}
    if built is not None and built["name"].count(":") == 1:  # a name on a hub could not be built without a network
        classes = {"num_classes": model.num_classes} if isinstance(getattr(model, "num_classes", None), int) else {}
        return built["name"], {**built["options"], **classes}
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        return None, {}
    options: dict[str, Any] = {"num_classes": model.num_classes}
    if spec.channels != 3:
        options["in_chans"] = spec.channels
    image = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image is not None and tuple(image) != tuple(config.get("input_size", (0, 0, 0))[1:]):
        options["img_size"] = list(image)
    return f"timm:{config['architecture']}", options


def read_description(path: Path) -> Description | None:
    """Return what a safetensors file says of its model; ``None`` if it says nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}).") from error
    if KEY not in metadata:
        return None
    values = json.loads(metadata[KEY])
    for name in ("size", "mean", "std"):
        values[name] = tuple(values[name])
    return Description(**values)
