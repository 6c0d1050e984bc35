"""State dicts as flat tensors and JSON values, which is all that safetensors and JSON can hold."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the tensors on the CPU, which share no memory, under longer names."""
    return {prefix + name: x.detach().to("cpu", copy=True).contiguous() for name, x in state.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names have this prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def pack_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes an optimizer's state dict apart: its tensors, and the rest as JSON values."""
    tensors, rest = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"rest": rest, "param_groups": state["param_groups"]}


def unpack_optimizer(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts together what `pack_optimizer` took apart."""
    state: dict[int | str, dict[str, Any]] = {}
    for key, value in {**tensors, **values["rest"]}.items():
        of, name = key.rsplit(".", 1)
        state.setdefault(int(of) if of.isdecimal() else of, {})[name] = value
    groups = [
        {name: tuple(value) if name == "betas" else value for name, value in group.items()}
        for group in values["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
