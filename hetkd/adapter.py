"""The adapter contract: how any model becomes feature maps, and where adapters come from.

An adapter knows one family of models. It is found through the entry-point group
``hetkd.adapters`` (the built-in families come the same way) or registered with `register_adapter`.
`adapters/README.md` shows how to write one.
"""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hetkd.grid import tokens_to_map
from hetkd.names import Registry, unknown_name

ENTRY_POINT_GROUP = "hetkd.adapters"


@dataclass(frozen=True)
class Features:
    """What one forward pass of a model yields.

    Attributes:
        logits: ``[B, classes]``, or ``None`` for a model without a classifier.
        maps: Feature maps ``[B, C, h, w]`` of the requested stages, in their order, at native
            grids, without prefix tokens.
        pooled: ``[B, C]``, the vector that the classifier sees, or ``None`` if there is none.
        distillation_logits: ``[B, classes]`` of the second classifier of a student with a distillation
            token that is in training (DeiT, arXiv 2012.12877); ``None`` elsewhere.
    """

    logits: Tensor | None
    maps: tuple[Tensor, ...]
    pooled: Tensor | None = None
    distillation_logits: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a model can be tapped, and the shape of what comes out there."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the feature map."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.name} [{self.channels}, {self.height}, {self.width}]"


@dataclass(frozen=True)
class StagePair:
    """A teacher stage and the student stage that learns from it."""

    teacher: Stage
    student: Stage


class Adapter(ABC):
    """Taps the models of one family.

    Attributes:
        family: The name of the family, as users know it.
        priority: Of all adapters that accept a model, the one with the highest priority taps it
            (ties: the first name in alphabetical order). The built-in families have 0 or 1, the generic
            adapter -100, so that an adapter of one's own wins without setting anything.
    """

    family: ClassVar[str]
    priority: ClassVar[int] = 10

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Says whether this adapter can tap ``model``. Must not raise and not run the model."""

    @abstractmethod
    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """Lists every place where ``model`` can be tapped, in order of depth.

        Args:
            model: A model that this adapter accepts.
            images: A sample input of the model, for adapters that find stages by a dry run.

        Raises:
            NoSpatialFeatures: If there is none.
        """

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Runs the model once and returns its features.

        Args:
            model: A model that this adapter accepts.
            images: ``[B, C, H, W]``, already resized and normalised for this model.
            stages: Names from `stage_names`, in any order.

        Returns:
            Logits as ``model(images)`` gives them, and one map a stage, in the order of ``stages``.

        Raises:
            RuntimeError: If a stage yields no feature map. A missing feature never passes silently.
        """


class HookAdapter(Adapter):
    """Base of adapters that tap submodules by forward hooks.

    The model runs through its own ``forward``, so its logits are those of ``model(images)``; a
    stage is the path of a submodule, and only the requested outputs are kept. Subclasses say which
    submodules are stages; `to_map` turns what a submodule returns into ``[B, C, h, w]``.
    """

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Turns the output of a stage's module into a feature map ``[B, C, h, w]``.

        The default takes the first tensor of a tuple, passes rank 4 on as it is, and lays rank 3
        out as patch tokens.

        Args:
            output: What the module returned.
            model: The whole model.
            images: What the model saw.
        """
        tensor = first_tensor(output)
        return tokens_to_map(tensor, (images.shape[-2], images.shape[-1])) if tensor.ndim == 3 else tensor

    def call(self, model: nn.Module, images: Tensor) -> Any:
        """Calls ``model(images)``; override it for models that take anything else.

        Models compiled in place run uncompiled here, for compiled code does not see hooks that come and go.
        """
        return model._call_impl(images)

    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Runs the model by `call` with hooks on the modules named by ``stages``; see `Adapter.run`."""
        with tapped(model, stages) as outputs:
            output = self.call(model, images)
        maps = tuple(self.to_map(outputs.of(name), model, images) for name in stages)
        logits, distillation_logits = class_and_distillation_logits(model, output)
        pooled = getattr(output, "pooler_output", None) if logits is None else outputs.classifier_input
        return Features(logits, maps, pooled, distillation_logits)


class Outputs:
    """What the tapped modules of a model returned in one forward pass, in the order in which they finished."""

    def __init__(self, model: nn.Module) -> None:
        self.finished: dict[str, Any] = {}
        self.classifier_input: Tensor | None = None
        self._model = type(model).__name__
        self._versions: dict[str, int] = {}

    def of(self, name: str) -> Any:
        """Returns the output of the module ``name``.

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
        """Says whether an in-place operation changed what the module ``name`` returned."""
        tensor = find_tensor(self.finished[name])
        return tensor is not None and name in self._versions and tensor._version != self._versions[name]

    def keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Returns a forward hook that keeps a module's last output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.finished.pop(name, None)
            self.finished[name] = output
            tensor = find_tensor(output)
            if tensor is not None and not tensor.is_inference():
                self._versions[name] = tensor._version

        # Traced, it would break a compiled graph, once for each name. Where nothing compiles, the compiler stays out.
        return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook

    def keep_classifier_input(self, module: nn.Module, args: Any) -> None:
        """Is a forward pre-hook that keeps the vectors that a classifier, or its part behind pooling, sees."""
        x = args[0] if args else None
        if self.classifier_input is None and isinstance(x, Tensor) and x.ndim > 1 and x[0].numel() == x.shape[1]:
            self.classifier_input = x.flatten(1)


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[Outputs]:
    """Keeps what the modules of these paths return, and what the classifier sees, while the context lasts.

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
    """Returns ``output`` itself or the first tensor in it: in nested tuples, lists or Hugging Face outputs."""
    found = find_tensor(output)
    if found is None:
        raise RuntimeError(
            f"expected a tensor or a tuple of tensors from a tapped module, got {type(output).__name__}."
        )
    return found


def find_tensor(output: Any) -> Tensor | None:
    """Returns what `first_tensor` does, or ``None`` if there is no tensor."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for tensor in map(find_tensor, values) if tensor is not None), None)


def output_logits(output: Any) -> Tensor | None:
    """Returns the logits ``[B, classes]`` in a model's output, or ``None`` if it has none.

    Of several classifiers it takes the first, or their average where the model makes one.
    """
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    else:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    return logits if isinstance(logits, Tensor) and logits.ndim == 2 else None


@contextmanager
def both_classifiers(model: Any, *, enabled: bool) -> Iterator[None]:
    """Lets both classifiers of a model with a distillation token answer in training while the context lasts.

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
    """Returns the logits in a model's output, and within `both_classifiers` those of its distillation token too."""
    if not (model.training and getattr(model, "distilled_training", False)):
        return output_logits(output), None
    if isinstance(output, tuple):  # timm's
        return output_logits(output), output_logits(output[1:])
    return output.cls_logits, output.distillation_logits  # Hugging Face's


def find_classifier(model: Any) -> nn.Module | None:
    """Returns the layer that makes the logits: the last linear layer, or ``None``.

    timm models name theirs by ``get_classifier``; of several the first is taken (DeiT's, on the
    class token), of one a stage the last.
    """
    if hasattr(model, "get_classifier"):
        classifier = model.get_classifier()
        while isinstance(classifier, (tuple, nn.ModuleList)):
            classifier = classifier[-1 if isinstance(classifier, nn.ModuleList) else 0] if len(classifier) else None
        return classifier if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity) else None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


adapters: Registry[type[Adapter]] = Registry("adapter")
_loaded: set[str] = set()
AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])


def register_adapter(name: str) -> Callable[[AdapterClass], AdapterClass]:
    """Returns a class decorator that registers an `Adapter` under ``name``.

    Packages do the same without an import, by an entry point in the group ``hetkd.adapters``.

    Raises:
        ValueError: If the name is malformed or taken.
        TypeError: If what is decorated is not a subclass of `Adapter`.
    """
    _load_entry_points()
    add = adapters.register(name)

    def decorate(adapter: AdapterClass) -> AdapterClass:
        add(_checked(name, adapter))
        return adapter

    return decorate


def _checked(name: str, adapter: Any) -> Any:
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"adapter {name!r} must be a subclass of hetkd.Adapter, got {adapter!r}.")
    return adapter


def list_adapters() -> list[str]:
    """Returns the names of all adapters, those of installed plug-ins included."""
    _load_entry_points()
    return adapters.names()


def find_adapter(model: nn.Module) -> Adapter:
    """Returns the adapter that taps ``model``: of those that accept it, the one of highest priority.

    Raises:
        TypeError: If no adapter accepts the model.
    """
    _load_entry_points()
    ranked = sorted(adapters.names(), key=lambda name: -adapters[name].priority)
    for name in ranked:
        adapter = adapters[name]()
        try:
            accepted = adapter.accepts(model)
        except Exception as error:  # whatever a plug-in does wrong, the others go on working
            message = f"hetkd adapter {name!r} fails to say whether it accepts {type(model).__name__} ({error!r})."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            continue
        if accepted:
            return adapter
    raise TypeError(f"no adapter accepts {type(model).__name__}; write one (adapters/README.md). Asked: {ranked}.")


def _load_entry_points() -> None:
    if _loaded:
        return
    _loaded.add(ENTRY_POINT_GROUP)  # first, for a plug-in that registers by the decorator comes back here
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            adapter = _checked(entry_point.name, entry_point.load())
            if entry_point.name not in adapters or adapters[entry_point.name] is not adapter:
                adapters.register(entry_point.name)(adapter)
        except Exception as error:  # a plug-in may fail in any way; the others must go on working
            origin = entry_point.dist.name if entry_point.dist else "an unknown package"
            message = f"hetkd adapter {entry_point.name!r} of {origin} does not load ({error!r}) and is left out."
            warnings.warn(message, RuntimeWarning, stacklevel=2)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and afterwards every submodule back into the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class NoSpatialFeatures(ValueError):
    """A model yields no feature map anywhere; it can only be distilled by its logits."""


class Probe(NamedTuple):
    """What a run on a sample says of a model.

    Attributes:
        stages: In order of depth.
        classes: Of its classifier, or ``None`` without one.
        pooled: Channels of the vector that the classifier sees, or ``None`` if there is none.
    """

    stages: list[Stage]
    classes: int | None
    pooled: int | None


def probe(
    adapter: Adapter, model: nn.Module, images: Tensor, extra: Sequence[str] = (), *, stages: bool = True
) -> Probe:
    """Runs ``model`` on a sample, without gradients and in eval mode.

    Args:
        adapter: One that accepts the model.
        model: The model.
        images: The sample.
        extra: Paths of modules that are to be stages beside those that the adapter lists.
        stages: Whether to look for stages at all.

    Raises:
        NoSpatialFeatures: If the adapter finds no stage.
    """
    with eval_mode(model), torch.no_grad():
        listed = adapter.stage_names(model, images) if stages else []
        added = [name for name in dict.fromkeys(extra) if name not in listed]
        paths = {path for path, _ in model.named_modules() if path}
        with tapped(model, [name for name in (*listed, *added) if name in paths]) as outputs:
            features = adapter.run(model, images, [*listed, *added])
    names = _in_order_of_depth(listed, added, list(outputs.finished))
    shapes = {name: _map_shape(name, x) for name, x in zip([*listed, *added], features.maps, strict=True)}
    classes, pooled = (None if x is None else x.shape[1] for x in (features.logits, features.pooled))
    return Probe([Stage(name, *shapes[name]) for name in names], classes, pooled)


def _in_order_of_depth(listed: list[str], added: list[str], finished: list[str]) -> list[str]:
    """Puts each added name behind the last listed one that finished before it."""
    names = list(listed)
    for name in added:
        before = [other for other in finished[: finished.index(name)] if other in names]
        names.insert(max((names.index(other) + 1 for other in before), default=0), name)
    return names


def _map_shape(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 4:
        raise RuntimeError(f"stage {name!r} yields a tensor of shape {list(x.shape)}, not a feature map [B, C, h, w].")
    return x.shape[1], x.shape[2], x.shape[3]


def find_stage(what: str, name: str, stages: Sequence[Stage]) -> Stage:
    """Returns the stage called ``name``; raises with the nearest names if there is none."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise unknown_name(what, name, [stage.name for stage in stages])
