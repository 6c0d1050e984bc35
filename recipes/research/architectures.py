"""Every architecture of timm, torchvision and transformers, each in the smallest form that it has; segmenters too."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision.models
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)

from hetkd import load_model

CLASSES = 10

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}

SPECIAL: dict[str, dict[str, Any]] = {
    "donut-swin": {"window_size": 2},
    "efficientnet": {"initializer_range": 0.2},  # with less, an untrained one this deep yields zeros
    "swin": {"window_size": 2},
    "timm_backbone": {"backbone": "resnet18", "out_indices": (1, 2, 3, 4)},
    "timm_wrapper": {"architecture": "resnet18"},
}

SEGMENTERS: dict[str, dict[str, Any]] = {
    "beit": {"out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"out_indices": [1, 2, 3, 4]},
    "eomt": {"num_blocks": 1},
    "eomt_dinov3": {"num_blocks": 1},
    "dpt": {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16},
}
"""Fields of segmenters that a small configuration needs beside."""

SMP_DECODERS = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet"),
    *("Segformer", "DPT"),
)

SMALL_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

LARGE = ("base", "large", "huge", "giant", "gigantic", "enormous", "so400m", "_xl", "_l", "_b_", "_m_", "384", "448")


@dataclass(frozen=True)
class Candidate:
    """An architecture: its library, its class or type, the name of the variant, and how that is built."""

    library: str
    architecture: str
    name: str
    build: Callable[[], nn.Module]


def candidates(pattern: str, task: str = "classification") -> Iterator[Candidate]:
    """Yield the architectures of the libraries, for a task, whose ``LIBRARY:NAME`` the pattern matches."""
    for library, source in SOURCES[task].items():
        if fnmatchcase(library, pattern.partition(":")[0]):
            yield from (c for c in source() if fnmatchcase(f"{library}:{c.name}", pattern))


def timm_candidates() -> Iterator[Candidate]:
    """Yield the smallest variant of each class of timm; parameters are counted on the meta device."""
    for architecture, names in sorted(timm_classes().items()):
        # Variants of these names are large; building hundreds of them takes longer than checking one.
        small = [name for name in names if not any(word in name for word in LARGE)] or names
        name = min(small, key=timm_parameters)
        yield Candidate("timm", architecture, name, partial(timm.create_model, name, num_classes=CLASSES))


def timm_classes() -> dict[str, list[str]]:
    """Return the names of timm's models by their class, without building them."""
    found: dict[str, list[str]] = {}

    class Asked(Exception):
        """Carries the class that a model function asks timm's builder for."""

    def builder(model_class: Any, *args: Any, **kwargs: Any) -> None:
        raise Asked(model_class.__name__)

    modules = [module for name, module in sys.modules.items() if name.startswith("timm.models.")]
    with ExitStack() as patches:
        for module in modules:
            if hasattr(module, "build_model_with_cfg"):
                patches.enter_context(patch.object(module, "build_model_with_cfg", builder))
        for name in timm.list_models():
            try:
                timm.models.model_entrypoint(name)()
            except Asked as asked:
                found.setdefault(str(asked), []).append(name)
    return found


def timm_parameters(name: str) -> int:
    """Count the parameters of a timm model without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def torchvision_candidates() -> Iterator[Candidate]:
    """Yield every classification model of torchvision."""
    for name in torchvision.models.list_models(module=torchvision.models):
        build = partial(load_model, f"torchvision:{name}", pretrained=False, num_classes=CLASSES)
        yield Candidate("torchvision", name, name, build)


def hugging_face_candidates() -> Iterator[Candidate]:
    """Yield every type in transformers' mappings of image classifiers and of backbones."""
    for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        yield Candidate(
            "hf", "image classifier", name, partial(hugging_face_model, name, AutoModelForImageClassification)
        )
    for name in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        yield Candidate("hf", "backbone", f"{name} backbone", partial(hugging_face_model, name, AutoBackbone))


def hugging_face_model(model_type: str, auto_class: Any, **fields: Any) -> nn.Module:
    """Build a model of a small configuration of its type, with some fields of its own."""
    config = small_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    config.architectures = []  # transformers 5 iterates over it
    config.num_labels = CLASSES
    return auto_class.from_config(config)


def small_config(model_type: str) -> Any:
    """Make a configuration of few layers and few channels, of whatever fields its type has."""
    default = AutoConfig.for_model(model_type)
    if hasattr(default, "vision_config"):
        vision = smaller_fields(default.vision_config)
        return AutoConfig.for_model(model_type, vision_config=vision, text_config=SMALL_TEXT)
    return AutoConfig.for_model(model_type, **{**smaller_fields(default), **SPECIAL.get(model_type, {})})


def smaller_fields(config: Any) -> dict[str, Any]:
    """Return smaller values of the fields that a configuration has."""
    fields = {name: value for name, value in SMALL.items() if isinstance(getattr(config, name, None), int)}
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        fields["depths"] = type(config.depths)([1] * len(config.depths))
    if isinstance(getattr(config, "hidden_sizes", None), tuple):  # ConvNeXt's backbone adds them to a list
        fields["hidden_sizes"] = list(config.hidden_sizes)
    return fields


def timm_segmenters() -> Iterator[Candidate]:
    """Yield the smallest variant of each class of timm, with hetkd's small decoder."""
    for candidate in timm_candidates():
        build = partial(
            load_model, f"timm:{candidate.name}", pretrained=False, task="segmentation", num_classes=CLASSES
        )
        yield Candidate("timm", candidate.architecture, candidate.name, build)


def torchvision_segmenters() -> Iterator[Candidate]:
    """Yield every segmentation model of torchvision."""
    for name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        yield Candidate("torchvision", name, name, partial(torchvision.models.get_model, name, **options))


def hugging_face_segmenters() -> Iterator[Candidate]:
    """Yield every type in transformers' mappings of semantic and of universal segmenters."""
    kinds = {
        "semantic": (MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, AutoModelForSemanticSegmentation),
        "universal": (MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES, AutoModelForUniversalSegmentation),
    }
    for kind, (names, auto_class) in kinds.items():
        for name in names:
            build = partial(hugging_face_model, name, auto_class, **SEGMENTERS.get(name, {}))
            yield Candidate("hf", f"{kind} segmenter", name, build)


def smp_segmenters() -> Iterator[Candidate]:
    """Yield every decoder of segmentation_models_pytorch on a ResNet18, and one on an encoder of timm's."""
    import segmentation_models_pytorch as smp

    for name in SMP_DECODERS:
        encoder = "tu-vit_tiny_patch16_224.augreg_in21k" if name == "DPT" else "resnet18"
        options = {"encoder_name": encoder, "encoder_weights": None, "classes": CLASSES}
        yield Candidate("smp", name, name, partial(getattr(smp, name), **options))
    options = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None, "classes": CLASSES}
    yield Candidate("smp", "Unet", "Unet on timm", partial(smp.Unet, **options))


SOURCES: dict[str, dict[str, Callable[[], Iterator[Candidate]]]] = {
    "classification": {
        "timm": timm_candidates,
        "torchvision": torchvision_candidates,
        "hf": hugging_face_candidates,
    },
    "segmentation": {
        "timm": timm_segmenters,
        "torchvision": torchvision_segmenters,
        "hf": hugging_face_segmenters,
        "smp": smp_segmenters,
    },
}
