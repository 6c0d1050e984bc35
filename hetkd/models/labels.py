"""The names of a model's classes, as far as the model knows them."""

from typing import Any, NamedTuple

from torch import nn


class Labels(NamedTuple):
    """Names of classes, in the order of the logits.

    Attributes:
        names: All names of each class: ``("n01440764", "tench", "Tinca tinca")``.
        certain: Whether the model itself carries them; else they are those of the weights that it may have.
    """

    names: list[tuple[str, ...]]
    certain: bool


def model_labels(model: Any, classes: int | None) -> Labels | None:
    """Return the labels of a model with so many classes; ``None`` where it does not know them.

    Hugging Face models have them in their configuration (``id2label``), timm models in their pretrained configuration,
    torchvision models of `hetkd.load_model` in the weights' metadata; ImageNet's are known by their number.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(names, dict) and len(names) == classes:
        listed = [str(names[key]) for key in sorted(names, key=int)]
        if not all(name == f"LABEL_{index}" for index, name in enumerate(listed)):
            return Labels([_synonyms(name) for name in listed], certain=True)
    config = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(config, dict) and config.get("label_names") and len(config["label_names"]) == classes:
        return Labels([_synonyms(str(name)) for name in config["label_names"]], certain=True)
    categories = getattr(model, "input_settings", {}).get("categories")
    if categories and len(categories) == classes:
        return Labels([_synonyms(name) for name in categories], certain=True)
    return Labels(imagenet_labels(), certain=False) if classes == 1000 and isinstance(model, nn.Module) else None


def imagenet_labels() -> list[tuple[str, ...]]:
    """Return WordNet's ids and the names of ImageNet-1K's classes, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [(wnid, *_synonyms(info.label_name_to_description(wnid, detailed=False))) for wnid in info.label_names()]


def _synonyms(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys([name, *(part.strip() for part in name.split(","))]))
