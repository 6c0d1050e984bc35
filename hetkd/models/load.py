"""Models from strings: timm, Hugging Face, torchvision."""

import traceback
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hetkd.models.description import BUILT_FROM, Description, read_description
from hetkd.models.weights import load_weights
from hetkd.utils.checks import choice, unknown_name

LIBRARIES = ("timm", "hf", "torchvision")
_FETCHING = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib", "urllib3")


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    task: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model from a string.

    Args:
        name: ``"timm:NAME"``, ``"hf:ORG/NAME"`` or ``"hf:DIRECTORY"`` (of ``save_pretrained``), or
            ``"torchvision:NAME"``; a bare name means timm. Or ``"FILE.safetensors"`` that hetkd saved: the file says
            which model it is, and how its images are prepared.
        num_classes: Classes of the head; ``None`` keeps what the model has. A pretrained model with another number gets
            a new, untrained head.
        pretrained: Load the library's pretrained weights.
        weights: Weights from this file instead: safetensors, or a PyTorch file of tensors only. With ``num_classes`` a
            head of another number of classes in it is left out.
        task: ``"segmentation"``: a segmenter. timm's models become encoders with a small decoder
            (`hetkd.models.segmenters.TimmSegmenter`), and need ``num_classes``; ``None``: as the model is.
        **kwargs: Passed to the library (``in_chans=1``, ``img_size=64``, ...).

    Returns:
        The library's own module, in eval mode if it has weights.

    Raises:
        ValueError: If library, name or weights are not valid; nearest names are given.
        RuntimeError: If pretrained weights cannot be fetched.
        FileNotFoundError: If ``weights`` does not exist.

    Example:
        >>> model = load_model("timm:test_vit", pretrained=False, num_classes=10)
        >>> model.num_classes
        10
    """
    if is_file(name):
        if weights is not None:
            raise ValueError(f"name={name!r} is a file of weights already: leave weights={str(weights)!r} out.")
        return _described_model(Path(name).expanduser(), num_classes, kwargs)
    library, model_name = split_name(name)
    if task is not None and choice("task", task, ("classification", "segmentation")) == "segmentation":
        kwargs = {**kwargs, "task": task}
    builders: dict[str, Callable[..., nn.Module]] = {
        "timm": _timm_model,
        "hf": _hugging_face_model,
        "torchvision": _torchvision_model,
    }
    fetch = pretrained and weights is None
    model = builders[library](model_name, num_classes, fetch, kwargs)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    setattr(model, BUILT_FROM, {"name": f"{library}:{model_name}", "options": {**kwargs, **classes}})
    if weights is not None:
        load_weights(model, weights, new_head=num_classes)
    return model.eval() if fetch or weights is not None else model


def is_file(name: str) -> bool:
    """Say whether a model's name is the path of a file of weights."""
    return name.endswith(".safetensors")


def _described_model(path: Path, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Build the model that a file of weights says it is, and load them."""
    description = read_description(path)
    if description is None:
        raise ValueError(
            f"{path} does not say which model it is (hetkd did not save it): load_model('timm:NAME', "
            f"num_classes=..., weights={str(path)!r})."
        )
    if description.name is None:
        raise ValueError(
            f"{path} is of a module that only its own code can build: build it, and "
            f"hetkd.models.load_weights(model, {str(path)!r})."
        )
    model = _built(description, num_classes, kwargs)
    load_weights(model, path, new_head=num_classes)
    resized = {} if kwargs.get("img_size") is None else {"size": kwargs["img_size"]}
    settings = description.input_settings(str(path))
    if num_classes not in (None, description.options.get("num_classes")):
        settings["categories"] = None
    model.input_settings = {**settings, **resized}  # type: ignore[assignment]
    return model.eval()


def _built(description: Description, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    assert description.name is not None
    if description.name == "hf:":
        return _hugging_face_class(description, num_classes, kwargs)
    options = {**description.options, **kwargs, **({} if num_classes is None else {"num_classes": num_classes})}
    return load_model(description.name, pretrained=False, **options)


def _hugging_face_class(description: Description, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    import transformers

    labels = {} if num_classes is None else {"num_labels": num_classes}
    values = {name: x for name, x in description.options["config"].items() if not (labels and "2" in name)}
    config = transformers.AutoConfig.for_model(**{**values, **labels})
    model_class = getattr(transformers, description.options["class"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {description.options['class']!r}.")
    model: nn.Module = model_class(config, **kwargs)
    return model


def change_classes(model: nn.Module, classes: int) -> None:
    """Turn a model that `load_model` built into one with another number of classes, in place.

    Args:
        model: All its weights stay, except those of the head, which is new and untrained.
        classes: Of the new head.
    """
    built = getattr(model, BUILT_FROM)
    new = load_model(built["name"], pretrained=False, **{**built["options"], "num_classes": classes})
    new.to(next(model.parameters()).device).train(model.training)
    for path, module in list(new.named_modules()):
        own, old = module.state_dict(), model.get_submodule(path).state_dict()
        if not list(module.children()) and any(own[key].shape != old[key].shape for key in own):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
    for name in ("num_classes", "num_labels", "config", BUILT_FROM):
        if hasattr(new, name):
            setattr(model, name, getattr(new, name))


def list_models(pattern: str = "*") -> list[str]:
    """List the names that `load_model` takes, of timm and torchvision; Hugging Face's hub cannot be listed offline.

    Args:
        pattern: With ``*`` and ``?``: ``"timm:*mobile*"``, ``"torchvision:*"``. A bare pattern is matched in both
            libraries.

    Returns:
        Names with their library, sorted: ``"timm:mobilenetv2_100"``.

    Raises:
        ValueError: If the library is unknown, or if nothing matches; nearest names are given.

    Example:
        >>> list_models("timm:resnet18*")[:2]
        ['timm:resnet18', 'timm:resnet18d']
    """
    import timm
    import torchvision.models

    names = {
        "timm": timm.list_models(),
        "torchvision": torchvision.models.list_models(module=torchvision.models),
    }
    library, separator, rest = pattern.rpartition(":")
    if separator:
        choice("library of models", library, names)
        names = {library: names[library]}
    found = [f"{home}:{name}" for home, known in names.items() for name in known if fnmatchcase(name, rest)]
    if not found:
        raise unknown_name("model", rest.strip("*?"), [name for known in names.values() for name in known])
    return sorted(found)


def split_name(name: str) -> tuple[str, str]:
    """Split ``"timm:resnet18"`` into library and name; a bare name is timm's.

    Raises:
        ValueError: If the library is unknown.
    """
    library, separator, rest = name.partition(":")
    if not separator or library in ("hf-hub", "local-dir"):  # timm's own schemes
        return "timm", name
    if library not in LIBRARIES:
        raise unknown_name("library", library, LIBRARIES)
    return library, rest


def _timm_model(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise unknown_name("timm model", name, timm.list_models())
    if "task" in kwargs:
        return _timm_segmenter(name, num_classes, pretrained, {key: x for key, x in kwargs.items() if key != "task"})
    if num_classes is not None:
        kwargs = {**kwargs, "num_classes": num_classes}
    model: nn.Module = _fetched(
        f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained=pretrained, **kwargs)
    )
    return model


def _timm_segmenter(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if num_classes is None:
        raise ValueError(f"load_model({name!r}, task='segmentation') needs the number of classes: num_classes=11.")
    from hetkd.models.segmenters import TimmSegmenter

    model: nn.Module = _fetched(
        f"timm:{name}", pretrained, lambda: TimmSegmenter(name, num_classes, pretrained, **kwargs)
    )
    return model


def _torchvision_model(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import torchvision.models

    segmenters = torchvision.models.list_models(module=torchvision.models.segmentation)
    known = [*torchvision.models.list_models(module=torchvision.models), *segmenters]
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    if kwargs.pop("task", None) and name not in segmenters:
        raise ValueError(
            f"torchvision's {name!r} classifies images: for segmentation use one of {', '.join(segmenters)}, or a timm "
            "encoder, 'timm:mobilenetv3_small_100'."
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    crop, resized = (getattr(preset, size, preset.resize_size)[0] for size in ("crop_size", "resize_size"))
    settings = {
        "size": crop,
        "mean": preset.mean,
        "std": preset.std,
        "interpolation": preset.interpolation.value,
        "crop_ratio": crop / resized,
        "source": "torchvision's preset",
    }
    if not pretrained:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        backbone = {"weights_backbone": None} if name in segmenters else {}
        model: Any = torchvision.models.get_model(name, weights=None, **backbone, **classes, **kwargs)
        model.input_settings = {**settings, "size": getattr(model, "image_size", crop)}
        return model
    classes_of_weights = len(weights.meta["categories"])
    if num_classes not in (None, classes_of_weights):
        raise ValueError(
            f"torchvision's weights of {name!r} have {classes_of_weights} classes, not num_classes={num_classes}: "
            "pass pretrained=False, or replace the head of the loaded model."
        )
    own = {**_torchvision_arguments(name, weights), **kwargs}
    model = torchvision.models.get_model(name, weights=None, num_classes=classes_of_weights, **own)
    state = _fetched(
        f"torchvision:{name}",
        True,
        lambda: torch.hub.load_state_dict_from_url(weights.url, map_location="cpu", check_hash=True, weights_only=True),
    )
    model.load_state_dict(state)
    model.input_settings = settings
    return model


def _torchvision_arguments(name: str, weights: Any) -> dict[str, Any]:
    """Return what torchvision's builders set when they are given weights, which they would unpickle."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "init_weights": False}
    return {"image_size": weights.meta["min_size"][0]} if name.startswith("vit_") else {}


def _hugging_face_model(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForSemanticSegmentation,
    )

    labels = {} if num_classes is None else {"num_labels": num_classes}
    config = _fetched(f"hf:{name}", True, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False, **labels))
    architectures = config.architectures or []
    has_head = any("ForImageClassification" in architecture for architecture in architectures)
    # A backbone's checkpoint stays a backbone, unless a head is asked for: a head of random weights is no teacher.
    builder: Any = AutoModelForImageClassification if has_head or num_classes is not None else AutoModel
    is_segmenter = any("ForSemanticSegmentation" in architecture for architecture in architectures)
    if kwargs.pop("task", None) or is_segmenter:
        builder = AutoModelForSemanticSegmentation
    if not pretrained:
        config.architectures = architectures
        model: nn.Module = builder.from_config(config, trust_remote_code=False, **kwargs)
        return model
    model = _fetched(
        f"hf:{name}",
        True,
        lambda: builder.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=num_classes is not None,
            **kwargs,
        ),
    )
    with suppress(OSError, ValueError):  # without an image processor beside the weights, its type's defaults hold
        AutoImageProcessor.from_pretrained(name, trust_remote_code=False)  # into the cache, for input_spec
    return model


def _fetched(name: str, from_network: bool, build: Callable[[], Any]) -> Any:
    """Build, and say what to do where pretrained weights cannot be fetched."""
    try:
        return build()
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} comes with Python code of its own, which hetkd does not run: if you trust it, load it with "
            "transformers and pass the module."
        ) from error
    except (OSError, RuntimeError) as error:
        if not from_network or not _is_of_fetching(error):
            raise
        file = f"hetkd.load_model({name!r}, weights='FILE.safetensors')"
        otherwise = "a directory of save_pretrained ('hf:DIRECTORY')" if name.startswith("hf:") else file
        raise RuntimeError(
            f"could not load {name} ({type(error).__name__}: {error}). Without a network, pass {otherwise}."
        ) from error


def _is_of_fetching(error: Exception) -> bool:
    """Say whether an error comes from the disk or from a package that fetches files, not from the model itself."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, OSError) or any(name == "torch.hub" or name.split(".")[0] in _FETCHING for name in modules)
