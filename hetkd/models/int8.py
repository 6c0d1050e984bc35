"""Training for int8: weights and inputs of convolutions and linear layers are rounded as int8 will round them."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NOT_SIMULATED = (nn.MultiheadAttention, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LEAST_SCALE, _MOMENTUM = 1e-8, 0.01
_RANGE = ("int8_low", "int8_high", "int8_seen")  # of a layer's inputs; buffers, for a child would look like a block


def simulate_int8(model: nn.Module) -> nn.Module:
    """Prepare a student for training that knows of int8 (Jacob et al., arXiv 1712.05877), in place.

    From now on convolutions and linear layers see weights rounded to int8, a scale an output channel, and inputs
    rounded to uint8 within a moving average of their range, outside of which they are cut off. Gradients pass through
    the rounding. `Distiller` and `fit` take such a student like any other, and what they measure is its simulated int8
    accuracy. Saved files hold plain weights: ``export("best.safetensors", "student.onnx", int8=True, images=...)``
    makes the int8 file.

    Attention that reads the weights of its layers instead of calling them (timm's BEiT and Swin V2, torchvision's
    transformers) sees rounded weights, but float inputs. A layer's ``weight`` is a rounded copy from now on: change the
    parameter itself, by ``named_parameters()``.

    Args:
        model: A student, trained in float before or not.

    Returns:
        The same module.

    Raises:
        ValueError: If it is prepared already, has no such layer, one whose weight is computed (weight norm), or
            PyTorch's own attention or transposed convolutions, which are not simulated.

    Example:
        >>> student = simulate_int8(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
        >>> student(torch.rand(4, 3, 2, 2)).shape
        torch.Size([4, 2])
    """
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    if is_simulated(model):
        raise ValueError("the model is prepared for int8 already: call simulate_int8 once.")
    refused = next((name for name, module in model.named_modules() if isinstance(module, _NOT_SIMULATED)), None)
    if refused is not None:
        raise ValueError(
            f"{refused or 'the model'} is a {type(model.get_submodule(refused)).__name__}, which simulate_int8 does "
            "not know: take a student without it, or train in float and export with int8=True."
        )
    if not layers:
        raise ValueError(f"{type(model).__name__} has neither convolutions nor linear layers: int8 changes nothing.")
    computed = [layer for layer in layers if layer._parameters.get("weight") is None]
    if computed:
        raise ValueError(
            f"the weight of a {type(computed[0]).__name__} is computed (weight norm or another parametrization): "
            "remove that first, torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
        )
    for layer in layers:
        for name, start in zip(_RANGE, (0.0, 0.0, False), strict=True):
            layer.register_buffer(name, torch.tensor(start, device=layer.weight.device))
        kind: Any = type(layer)
        layer.__class__ = _int8_class(kind)
    return model


def is_simulated(model: nn.Module) -> bool:
    """Say whether `simulate_int8` prepared a model."""
    return any(isinstance(module, _Int8Layer) for module in model.modules())


def without_simulation(model: nn.Module) -> nn.Module:
    """Return a copy as it was before `simulate_int8`, with the weights that were trained; other models as they are."""
    if not is_simulated(model):
        return model
    plain = copy.deepcopy(model)
    for layer in [module for module in plain.modules() if isinstance(module, _Int8Layer)]:
        for name in _RANGE:
            delattr(layer, name)
        plain_class: Any = type(layer).plain
        layer.__class__ = plain_class
    return plain


class _Int8Layer(nn.Module):
    """Stands before the class of a layer, whose code sees a rounded input, and a rounded weight where it asks for it.

    Parameters keep their names. Weights have 255 steps an output channel, symmetric around zero; inputs 256 steps
    within their range, which training follows by a moving average.
    """

    plain: type[nn.Module]
    int8_low: Tensor
    int8_high: Tensor
    int8_seen: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight, rounded."""
        weight = self._parameters["weight"]
        assert weight is not None
        scale = weight.detach().float().flatten(1).abs().amax(1).clamp_min(_LEAST_SCALE) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127).to(weight.dtype)

    def forward(self, input: Tensor, *others: Any) -> Any:  # the name that PyTorch's layers give it
        low, high = self._range(input.detach())
        scale = ((high - low) / 255).clamp_min(_LEAST_SCALE)
        zero = (-low / scale).round().clamp(0, 255).int()
        rounded = torch.fake_quantize_per_tensor_affine(input.float(), scale, zero, 0, 255).to(input.dtype)
        return super().forward(rounded, *others)

    @torch.no_grad()
    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range within which an input is rounded; in training, after the average has followed it."""
        low, high = (edge.float() for edge in x.aminmax())
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero stays zero, which padding needs
        share = _MOMENTUM * self.training
        low = torch.where(self.int8_seen, self.int8_low.float().lerp(low, share), low)
        high = torch.where(self.int8_seen, self.int8_high.float().lerp(high, share), high)
        if self.training:
            self.int8_low.copy_(low)
            self.int8_high.copy_(high)
            self.int8_seen.fill_(True)
        return low, high

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        rebuild, arguments, *rest = parts
        return _as_int8, (self.plain, rebuild, (self.plain, *arguments[1:])), *rest


def _as_int8(plain: Any, rebuild: Any, arguments: tuple[Any, ...]) -> Any:
    """Make the object that a pickle of a prepared layer is read into: its class is made anew, and has no name."""
    layer = rebuild(*arguments)
    layer.__class__ = _int8_class(plain)
    return layer


@cache
def _int8_class(plain: Any) -> Any:
    return type(f"Int8{plain.__name__}", (_Int8Layer, plain), {"plain": plain, "__module__": plain.__module__})
