"""Models from strings, weights from safetensors, and students back to disk in their library's own form."""

import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.names import choice, unknown_name

LIBRARIES = ("timm", "hf", "torchvision")


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model from a string.

    Args:
        name: ``"timm:NAME"``, ``"hf:ORG/NAME"`` or ``"hf:DIRECTORY"`` (of ``save_pretrained``), or
            ``"torchvision:NAME"``; a bare name means timm.
        num_classes: Classes of the head; ``None`` keeps what the model has. A pretrained model
            with another number gets a new, untrained head.
        pretrained: Load the library's pretrained weights.
        weights: Weights from this file instead: safetensors, or a PyTorch file of tensors only.
        **kwargs: Passed to the library (``in_chans=1``, ``img_size=64``, ...).

    Returns:
        The library's own module, in eval mode if it has weights.

    Raises:
        ValueError: If library, name or weights are not valid; nearest names are given.
        RuntimeError: If pretrained weights cannot be fetched.
        FileNotFoundError: If ``weights`` does not exist.
    """
    library, model_name = split_name(name)
    builders: dict[str, Callable[..., nn.Module]] = {
        "timm": _timm_model,
        "hf": _hugging_face_model,
        "torchvision": _torchvision_model,
    }
    fetch = pretrained and weights is None
    model = builders[library](model_name, num_classes, fetch, kwargs)
    if weights is not None:
        load_weights(model, weights)
    return model.eval() if fetch or weights is not None else model


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names that `load_model` takes, of timm and torchvision; Hugging Face's hub cannot be listed offline.

    Args:
        pattern: With ``*`` and ``?``: ``"timm:*mobile*"``, ``"torchvision:*"``. A bare pattern is
            matched in both libraries.

    Returns:
        Names with their library, sorted: ``"timm:mobilenetv2_100"``.

    Raises:
        ValueError: If the library is unknown, or if nothing matches; nearest names are given.
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
    """Splits ``"timm:resnet18"`` into library and name; a bare name is timm's.

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
    if num_classes is not None:
        kwargs = {**kwargs, "num_classes": num_classes}
    model: nn.Module = _fetched(
        f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained=pretrained, **kwargs)
    )
    return model


def _torchvision_model(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    crop, resized = preset.crop_size[0], preset.resize_size[0]
    settings = {
        "size": crop,
        "mean": preset.mean,
        "std": preset.std,
        "interpolation": preset.interpolation.value,
        "crop_ratio": crop / resized,
    }
    if not pretrained:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        model: Any = torchvision.models.get_model(name, weights=None, **classes, **kwargs)
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
    """Returns what torchvision's builders set when they are given weights, which they would unpickle."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "init_weights": False}
    return {"image_size": weights.meta["min_size"][0]} if name.startswith("vit_") else {}


def _hugging_face_model(name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    labels = {} if num_classes is None else {"num_labels": num_classes}
    config = _fetched(f"hf:{name}", True, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False, **labels))
    architectures = config.architectures or []
    has_head = any("ForImageClassification" in architecture for architecture in architectures)
    # A backbone's checkpoint stays a backbone, unless a head is asked for: a head of random weights is no teacher.
    builder = AutoModelForImageClassification if has_head or num_classes is not None else AutoModel
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
    """Builds, and says what to do where pretrained weights cannot be fetched."""
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
        if not from_network:
            raise
        file = f"hetkd.load_model({name!r}, weights='FILE.safetensors')"
        otherwise = "a directory of save_pretrained ('hf:DIRECTORY')" if name.startswith("hf:") else file
        raise RuntimeError(
            f"could not load {name} ({type(error).__name__}: {error}). Without a network, pass {otherwise}."
        ) from error


def copy_label_names(teacher: Any, student: Any) -> None:
    """Gives a Hugging Face student the names of its Hugging Face teacher's classes."""
    names = getattr(getattr(teacher, "config", None), "id2label", None)
    if names and len(names) == len(getattr(getattr(student, "config", None), "id2label", ())):
        student.config.id2label = dict(names)
        student.config.label2id = {name: index for index, name in names.items()}


def image_processor_settings(config: Any) -> dict[str, Any]:
    """Returns the settings of a Hugging Face model's image processor, from its files or its type's defaults."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if getattr(config, "_name_or_path", ""):
        with suppress(OSError, ValueError):  # the model may have come without an image processor
            processor = AutoImageProcessor.from_pretrained(
                config._name_or_path, local_files_only=True, trust_remote_code=False
            )
            return dict(processor.to_dict())
    if type(config) not in IMAGE_PROCESSOR_MAPPING:
        return {}
    entry = IMAGE_PROCESSOR_MAPPING[type(config)]
    classes = entry.values() if isinstance(entry, dict) else entry
    processor_class = next(candidate for candidate in classes if candidate is not None)
    return dict(processor_class().to_dict())


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict into a model, strictly; timm models may have been built for another input size.

    Args:
        model: Of the same architecture.
        path: A safetensors file, or a PyTorch file that holds nothing but tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no weights file, or keys or shapes differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r} does not exist.")
    state = _read_state_dict(path)
    expected = _shapes(model.state_dict())
    if _shapes(state) != expected:
        state = _fitted_by_timm(model, state)
    if _shapes(state) != expected:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {_differences(expected, _shapes(state))}")
    model.load_state_dict(state)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _fitted_by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts weights as timm does its own: position embeddings to another input size, keys of original releases."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return state
    try:
        return dict(convert(dict(state), model))
    except (KeyError, RuntimeError, ValueError):  # weights of another architecture; the caller tells what differs
        return state


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is not a file of weights that can be read safely ({error}).") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a state dict.")
    return state


def _differences(expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str:
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    reshaped = [key for key in sorted(expected.keys() & given.keys()) if expected[key] != given[key]]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    parts += [f"{key} has shape {given[key]} instead of {expected[key]}" for key in reshaped[:3]]
    return "; ".join(parts) + "."


def save_model(model: Any, path: str | Path) -> None:
    """Saves a plain model with its library's own keys.

    Args:
        model: The model.
        path: A file ending in ``.safetensors``; for a Hugging Face model also a directory, for
            ``save_pretrained``.

    Raises:
        ValueError: If the path fits neither.
    """
    from hetkd.files import write_atomically

    path, model = Path(path), unwrap(model)
    if path.suffix != ".safetensors":
        if not hasattr(model, "save_pretrained"):
            raise ValueError(f"path={str(path)!r} must end in '.safetensors'.")
        model.save_pretrained(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "architecture": architecture_name(model)}
    write_atomically(path, lambda temporary: save_tensors(model.state_dict(), temporary, metadata))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes tensors, copied to contiguous memory of their own (tied weights included), as safetensors."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    path.write_bytes(save(plain, metadata))


def unwrap(model: Any) -> Any:
    """Returns the module inside of DDP, DataParallel and ``torch.compile``; other modules as they are."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def tapped_module(model: Any) -> Any:
    """Returns the module that is tapped: that inside of `unwrap`, of PEFT, and of Hugging Face's wrapper of timm."""
    model = unwrap(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return tapped_module(model.get_base_model())
    is_wrapper = type(model).__module__.startswith("transformers.models.timm_wrapper")
    return model.timm_model if is_wrapper and hasattr(model, "timm_model") else model


def architecture_name(model: nn.Module) -> str:
    """Returns timm's or Hugging Face's name of an architecture, or the name of the class."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        return str(config["architecture"])
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
