"""Feature maps of any model: the contract of adapters, and the parts to write one with.

`docs/guides/own-adapter.md` shows how. Adapters import from here only.
"""

from hetkd.features.adapter import Adapter, Features, Stage, StagePair
from hetkd.features.grid import tokens_to_map, windows_to_map
from hetkd.features.hooks import (
    HookAdapter,
    Outputs,
    class_and_distillation_logits,
    find_classifier,
    find_tensor,
    first_tensor,
    is_segmenter,
    output_logits,
    tapped,
)
from hetkd.features.probe import NoSpatialFeatures
from hetkd.features.registry import find_adapter, list_adapters, register_adapter

__all__ = [
    "Adapter",
    "Features",
    "HookAdapter",
    "NoSpatialFeatures",
    "Outputs",
    "Stage",
    "StagePair",
    "class_and_distillation_logits",
    "find_adapter",
    "find_classifier",
    "find_tensor",
    "first_tensor",
    "is_segmenter",
    "list_adapters",
    "output_logits",
    "register_adapter",
    "tapped",
    "tokens_to_map",
    "windows_to_map",
]
