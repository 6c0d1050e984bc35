"""Compilation of the parts of a distillation, block by block."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

BLOCK_SHARE = 0.01
"""Smaller parts of a model than this share of its weights are no blocks of their own."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the elements of a model's lists and sequences of modules that hold much of it, inner ones first."""
    least = max(1, BLOCK_SHARE * sum(p.numel() for p in model.parameters()))
    containers = (nn.ModuleList, nn.Sequential)
    elements = dict.fromkeys(child for module in model.modules() if isinstance(module, containers) for child in module)
    whole = [element for element in elements if any(element.children()) and not isinstance(element, containers)]
    return [block for block in reversed(whole) if sum(p.numel() for p in block.parameters()) >= least]


def compile_parts(parts: Mapping[str, Sequence[nn.Module]], options: Mapping[str, Any]) -> None:
    """Compile modules in place; their parameters and names stay.

    Args:
        parts: The modules of each part, which are called one by one.
        options: Of ``torch.compile``.
    """
    for name, modules in parts.items():
        if not modules:
            warnings.warn(f"compile leaves the {name} as it is: it has no blocks.", RuntimeWarning, stacklevel=4)
        for module in modules:
            module.compile(**options)


def warn_if_inert() -> None:
    """Warn if nothing at all was compiled, although some compiled module has run."""
    from torch._dynamo.utils import counters

    if not counters["stats"]["unique_graphs"]:
        warnings.warn(
            "compile had no effect: PyTorch compiled nothing. Is TORCHDYNAMO_DISABLE set, or the stance force_eager?",
            RuntimeWarning,
            stacklevel=4,
        )
