"""Forward hooks: what the modules of a model return in one forward pass."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import Adapter, Features
from hetkd.features.grid import tokens_to_map

_LEAST_SHARE = 1e-6


class HookAdapter(Adapter):
    """Base of adapters that tap submodules by forward hooks.

    The model runs through its own ``forward``, so its logits are those of ``model(images)``; a stage is the path of a
    submodule, and only the requested outputs are kept. Subclasses say which submodules are stages; `to_map` turns what
    a submodule returns into ``[B, C, h, w]``.
    """

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Turn the output of a stage's module into a feature map ``[B, C, h, w]``.

        The default takes the first tensor of a tuple, passes rank 4 on as it is, and lays rank 3 out as patch tokens.

        Args:
            output: What the module returned.
            model: The whole model.
            images: What the model saw.
        """
        tensor = first_tensor(output)
        return tokens_to_map(tensor, (images.shape[-2], images.shape[-1])) if tensor.ndim == 3 else tensor

    def call(self, model: nn.Module, images: Tensor) -> Any:
        """Call ``model(images)``; override it for models that take anything else.

        Models compiled in place run uncompiled here, for compiled code does not see hooks that come and go.
        """
        return model._call_impl(images)

    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Run the model by `call` with hooks on the modules named by ``stages``; see `Adapter.run`."""
        with tapped(model, stages) as outputs:
            output = self.call(model, images)
        maps = tuple(self.to_map(outputs.of(name), model, images) for name in stages)
        logits, distillation_logits = class_and_distillation_logits(model, output)
        is_vector = logits is not None and logits.ndim == 2
        pooled = outputs.classifier_input if is_vector else getattr(output, "pooler_output", None)
        return Features(logits, maps, pooled, distillation_logits)


class Outputs:
    """Outputs of the tapped modules in one forward pass, in the order in which they finished."""

    def __init__(self, model: nn.Module) -> None:
        self.finished: dict[str, Any] = {}
        self.classifier_input: Tensor | None = None
        self._model = type(model).__name__
        self._versions: dict[str, int] = {}

    def of(self, name: str) -> Any:
        """Return the output of the module ``name``.

        Raises:
            RuntimeError: If it did not run, or if what it returned was overwritten later.
        """
        if name not in self.finished:
            raise RuntimeError(f"{self._model} did not run its stage {name!r}; no feature to distil there.")
        if self.is_overwritten(name):
            raise RuntimeError(
                f"{self._model} overwrites the output of {name!r} in place (by an in-place ReLU or addition): name the "
                "module that does so instead."
            )
        return self.finished[name]

    def is_overwritten(self, name: str) -> bool:
        """Say whether an in-place operation changed what the module ``name`` returned."""
        tensor = find_tensor(self.finished[name])
        return tensor is not None and name in self._versions and tensor._version != self._versions[name]

    def keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a forward hook that keeps a module's last output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.finished.pop(name, None)
            self.finished[name] = output
            tensor = find_tensor(output)
            if tensor is not None and not tensor.is_inference():
                self._versions[name] = tensor._version

        # Traced, it would break a compiled graph, once for each name. Where nothing compiles, the compiler stays out.
        return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook

    def keep_classifier_input(self, module: nn.Module, args: Any) -> None:
        """Record the classifier's input, or that of its part behind pooling (a forward pre-hook)."""
        x = args[0] if args else None
        if self.classifier_input is None and isinstance(x, Tensor) and x.ndim > 1 and x[0].numel() == x.shape[1]:
            self.classifier_input = x.flatten(1)


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[Outputs]:
    """Keep what the modules of these paths return, and what the classifier sees, while the context lasts.

    Args:
        model: The model; it is left without hooks.
        names: Paths of submodules.
    """
    outputs = Outputs(model)
    handles = [model.get_submodule(name).register_forward_hook(outputs.keep(name)) for name in names]
    classifier = find_classifier(model)
    if classifier is not None:
        inner = [classifier, *(module for module in classifier.modules() if isinstance(module, nn.Linear))]
        handles += [module.register_forward_pre_hook(outputs.keep_classifier_input) for module in dict.fromkeys(inner)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """Return ``output`` itself or the first tensor in it: in nested tuples, lists or Hugging Face outputs."""
    found = find_tensor(output)
    if found is None:
        raise RuntimeError(
            f"expected a tensor or a tuple of tensors from a tapped module, got {type(output).__name__}."
        )
    return found


def find_tensor(output: Any) -> Tensor | None:
    """Return what `first_tensor` does, or ``None`` if there is no tensor."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for tensor in map(find_tensor, values) if tensor is not None), None)


def output_logits(output: Any) -> Tensor | None:
    """Return the logits ``[B, classes]`` or ``[B, classes, h, w]`` in a model's output, or ``None`` if it has none.

    Of several classifiers it takes the first, or their average where the model makes one. A map alone may be features
    too, which `hetkd.features.tap.Tap` finds out.
    """
    if isinstance(output, Mapping) and "masks_queries_logits" in output:
        return logits_of_queries(output["class_queries_logits"], output["masks_queries_logits"])
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))  # torchvision's segmenters
    elif hasattr(output, "logits"):
        logits = output.logits
    else:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    ranks = (2,) if isinstance(output, (tuple, list)) else (2, 4)
    return logits if isinstance(logits, Tensor) and logits.ndim in ranks else None


def logits_of_queries(classes: Tensor, masks: Tensor) -> Tensor:
    """Return for each pixel the logarithm of each class's share, of a model whose queries have a class and a mask each.

    Mask2Former (Cheng et al., arXiv 2112.01527) and its kin segment by the largest share.

    Args:
        classes: ``[B, queries, classes + 1]``; the last one is none.
        masks: ``[B, queries, h, w]``, logits of each pixel's part in the mask.

    Returns:
        ``[B, classes, h, w]``, float32.
    """
    with torch.autocast(classes.device.type, enabled=False):
        shares = torch.einsum("bqc,bqhw->bchw", classes.float().softmax(2)[..., :-1], masks.float().sigmoid())
        return (shares + _LEAST_SHARE).log()


@contextmanager
def both_classifiers(model: Any, *, enabled: bool) -> Iterator[None]:
    """Let both classifiers of a model with a distillation token answer in training while the context lasts.

    timm's models have a flag ``distilled_training`` for it, which is also set on Hugging Face's.
    """
    has_two = hasattr(model, "distilled_training") or hasattr(model, "distillation_classifier")
    before = getattr(model, "distilled_training", False)
    if has_two:
        model.distilled_training = enabled
    try:
        yield
    finally:
        if has_two:
            model.distilled_training = before


def class_and_distillation_logits(model: nn.Module, output: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the logits in a model's output, and within `both_classifiers` those of its distillation token too."""
    if not (model.training and getattr(model, "distilled_training", False)):
        return output_logits(output), None
    if isinstance(output, tuple):  # timm's
        return output_logits(output), output_logits(output[1:])
    return output.cls_logits, output.distillation_logits  # Hugging Face's


def find_classifier(model: Any) -> nn.Module | None:
    """Return the layer that makes the logits: the last linear layer, or ``None``.

    timm models name theirs by ``get_classifier``; of several the first is taken (DeiT's, on the class token), of one a
    stage the last.
    """
    if hasattr(model, "get_classifier"):
        try:
            classifier = model.get_classifier()
        except AttributeError:  # timm's EfficientViT looks into a head that was taken off
            return None
        while isinstance(classifier, (tuple, nn.ModuleList)):
            classifier = classifier[-1 if isinstance(classifier, nn.ModuleList) else 0] if len(classifier) else None
        return classifier if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity) else None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards every submodule back into the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def is_from_library(model: Any) -> bool:
    """Say whether a library's own class tells logits from features, and its classifier was not taken off."""
    home = type(model).__module__.partition(".")[0]
    if home == "torchvision":
        return not isinstance(list(model.modules())[-1], nn.Identity)
    return home == "timm" or (home == "transformers" and "ForImageClassification" in type(model).__name__)


def is_segmenter(model: Any) -> bool:
    """Say whether a library's own class yields logits for each pixel."""
    home, name = type(model).__module__, type(model).__name__
    libraries = ("torchvision.models.segmentation", "segmentation_models_pytorch", "hetkd.models.segmenters")
    of_pixels = ("ForSemanticSegmentation", "ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")
    return home.startswith(libraries) or (home.startswith("transformers") and name.endswith(of_pixels))


def output_is_convolution(model: nn.Module, adapter: Adapter, images: Tensor) -> bool:
    """Say whether the output ``[B, C, h, w]`` is that of a convolution or linear layer, as it is or resized."""
    last: dict[torch.Size, Tensor] = {}  # of all layers with as many channels

    def keep(layer: nn.Module, x: Tensor) -> None:
        if x.ndim == 4:
            x = x if isinstance(layer, nn.Conv2d) else x.movedim(3, 1)
            last[x.shape[:2]] = x

    logits = _logits_beside_layers(model, adapter, images, keep)
    if logits is None or logits.ndim != 4 or logits.shape[:2] not in last:
        return False
    return any(torch.allclose(x, logits, atol=1e-4) for x in _resized_alike(last[logits.shape[:2]], logits))


def _resized_alike(x: Tensor, like: Tensor) -> Iterator[Tensor]:
    if x.shape == like.shape:
        yield x
    yield F.interpolate(x, like.shape[2:], mode="nearest")
    for align_corners in (False, True):
        yield F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


def output_is_linear(model: nn.Module, adapter: Adapter, images: Tensor) -> bool:
    """Say whether the output ranks like that of a linear layer or a convolution of as many channels, image by image.

    Softmax, scaling and averages over positions keep ranks; what an embedding goes through last does not.
    """
    found: list[Tensor] = []  # maps are large: their means are kept
    logits = _logits_beside_layers(
        model, adapter, images, lambda layer, x: found.append(x.mean((2, 3)) if x.ndim == 4 else x)
    )
    if logits is None:
        return False
    return any(x.shape == logits.shape and torch.equal(x.argsort(1), logits.argsort(1)) for x in found)


def _logits_beside_layers(
    model: nn.Module, adapter: Adapter, images: Tensor, keep: Callable[[nn.Module, Tensor], None]
) -> Tensor | None:
    """Return the logits of a run, in which ``keep`` sees the outputs of linear layers and convolutions."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            keep(module, output)

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        return adapter.run(model, images, ()).logits
    finally:
        for handle in handles:
            handle.remove()
