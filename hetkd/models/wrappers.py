"""Unwrap DDP, PEFT and Hugging Face's wrapper of timm, and name an architecture."""

from typing import Any

from torch import Tensor, nn


def unwrap(model: Any) -> Any:
    """Return the module inside of DDP, DataParallel and ``torch.compile``; other modules as they are."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def tapped_module(model: Any) -> Any:
    """Return the module that is tapped: that inside of `unwrap`, of PEFT, and of Hugging Face's wrapper of timm."""
    model = unwrap(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return tapped_module(model.get_base_model())
    is_wrapper = type(model).__module__.startswith("transformers.models.timm_wrapper")
    return model.timm_model if is_wrapper and hasattr(model, "timm_model") else model


def architecture_name(model: nn.Module) -> str:
    """Return timm's or Hugging Face's name of an architecture, or the name of the class."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        return str(config["architecture"])
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def trained_memory(model: nn.Module) -> dict[int, str]:
    """Return where a model's parameters and running statistics are in memory, with their names."""
    statistics = {f"running_{name}" for name in ("mean", "var")}
    trained = [
        *model.named_parameters(),
        *((name, x) for name, x in model.named_buffers() if name.split(".")[-1] in statistics),
    ]
    plain = [(name, x) for name, x in trained if x.device.type != "meta" and type(x) in (Tensor, nn.Parameter)]
    return {x.untyped_storage().data_ptr(): name for name, x in plain if x.numel()}
