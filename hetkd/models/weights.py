"""Weights from files, strictly, and students back to disk in their library's own form."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.models.description import KEY, Description, describe
from hetkd.models.int8 import without_simulation
from hetkd.models.wrappers import architecture_name, unwrap
from hetkd.utils.files import write_atomically, write_json, write_text


def load_weights(model: nn.Module, path: str | Path, *, new_head: int | None = None) -> None:
    """Load a state dict into a model, strictly; timm models may have been built for another input size.

    Args:
        model: Of the same architecture.
        path: A safetensors file, or a PyTorch file that holds nothing but tensors.
        new_head: Number of classes of the model, if a head of another number in the file is to be left out.

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
    if new_head is not None:
        state = _with_new_head(path, state, model.state_dict(), new_head)
    if _shapes(state) != expected:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {_differences(expected, _shapes(state))}")
    model.load_state_dict(state)


def _with_new_head(path: Path, state: dict[str, Tensor], own: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return weights with the model's own head where the file's has other classes or is missing, and say so."""

    def is_new(key: str) -> bool:
        x, old = own[key], state.get(key)
        return x.shape[:1] == (classes,) and (old is None or (old.shape != x.shape and old.shape[1:] == x.shape[1:]))

    new = [key for key in own if is_new(key)]
    heads = {key.rpartition(".")[0] for key in new}
    if not new or (len(heads) > 1 and not heads <= {key.rpartition(".")[0] for key in state}):
        return state
    before = next((f"of {len(state[key])} classes" for key in new if key in state), "missing")
    print(f"{path}: the classifier is {before}; the new one, {', '.join(sorted(heads))} of {classes}, is untrained")
    return {**state, **{key: own[key] for key in new}}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _fitted_by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights as timm does its own: position embeddings to another input size, keys of original releases."""
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


def save_model(model: Any, path: str | Path, description: Description | None = None) -> None:
    """Save a plain model with its library's own keys, and what it is in the file's metadata.

    Args:
        model: The model.
        path: A file ending in ``.safetensors``; for a Hugging Face model also a directory, for ``save_pretrained`` and
            its image processor.
        description: What is said of the model; ``None``: what it says itself.

    Raises:
        ValueError: If the path fits neither.
    """
    path, model = Path(path), without_simulation(unwrap(model))
    path = path.expanduser()
    description = description or describe(model)
    classes, labels = description.classes, getattr(getattr(model, "config", None), "id2label", None)
    if classes and labels and len(labels) == len(classes):
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: index for index, name in enumerate(classes)}
    if path.suffix != ".safetensors":
        if path.suffix or not hasattr(model, "save_pretrained"):
            raise ValueError(f"path={str(path)!r} must end in '.safetensors'.")
        model.save_pretrained(path)
        write_json(path / "preprocessor_config.json", description.image_processor())
        write_text(path / "README.md", description.card())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "architecture": architecture_name(model), KEY: description.to_json()}
    metadata |= {"classes": json.dumps(list(classes))} if classes else {}
    write_atomically(path, lambda temporary: save_tensors(model.state_dict(), temporary, metadata))


def save_described(model: Any, path: str | Path, description: Description) -> None:
    """Save a model as `save_model` does, and beside a file its ``config.json`` for timm and a model card.

    Beside ``FILE.safetensors`` they are ``FILE.json`` and ``FILE.md``.
    """
    save_model(model, path, description)
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        write_json(path.with_suffix(".json"), description.timm_configuration())
        write_text(path.with_suffix(".md"), description.card())


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors, copied to contiguous memory of their own (tied weights included), as safetensors."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    path.write_bytes(save(plain, metadata))
