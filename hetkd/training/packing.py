"""State dicts as flat tensors and JSON values, which is all that safetensors and JSON can hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the tensors on the CPU, which share no memory, under longer names."""
    return {prefix + name: x.detach().to("cpu", copy=True).contiguous() for name, x in state.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names have this prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Takes nested dictionaries, lists and tuples, as an optimizer's state dict, apart: its tensors, and JSON values.

    Raises:
        TypeError: If there is a value in it that neither can hold.
    """
    tensors: dict[str, Tensor] = {}

    def packed(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if isinstance(value, Mapping):  # with keys that may be numbers
            return {
                "items": [[key, packed(entry, f"{path}.{key}" if path else str(key))] for key, entry in value.items()]
            }
        if isinstance(value, (list, tuple)):
            entries = [packed(entry, f"{path}.{index}") for index, entry in enumerate(value)]
            return {"tuple": entries} if isinstance(value, tuple) else entries
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path} holds {value!r}, which a checkpoint cannot: use another optimizer.")

    return tensors, packed(state, "")


def unpack(tensors: Mapping[str, Tensor], values: Any) -> Any:
    """Puts together what `pack` took apart."""
    if isinstance(values, list):
        return [unpack(tensors, entry) for entry in values]
    if not isinstance(values, dict):
        return values
    ((kind, content),) = values.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return _DTYPES[content]
    entries = unpack(tensors, content)
    return tuple(entries) if kind == "tuple" else dict(entries)


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives what an optimizer keeps of each parameter the parameter's memory layout, which fused ones on CPUs rely on.

    A checkpoint holds contiguous tensors, but a parameter may be ``channels_last``.
    """
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == parameter.shape and x.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=x.dtype, device=x.device).copy_(x)
