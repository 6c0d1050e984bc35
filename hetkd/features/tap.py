"""One side of a distillation: a model with its input transform, its adapter and the stages that are tapped."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Adapter, Features, Stage
from hetkd.features.hooks import (
    HookAdapter,
    eval_mode,
    is_from_library,
    is_segmenter,
    output_is_convolution,
    output_is_linear,
)
from hetkd.features.pairing import POOLED
from hetkd.features.probe import NoSpatialFeatures, Probe, probe
from hetkd.features.registry import find_adapter
from hetkd.models.inputs import InputSpec, InputTransform, Normalization, input_spec
from hetkd.models.labels import Labels, model_labels
from hetkd.models.wrappers import architecture_name, tapped_module
from hetkd.utils.checks import unknown_name

Size = int | tuple[int, int]


class Tap:
    """One side of a distillation: a model, its input transform, its adapter and its tapped stages."""

    yields_probabilities = False

    def __init__(
        self,
        role: str,
        model: nn.Module,
        size: Size | None,
        normalized: Normalization | None,
        classes: int | None = None,
        *,
        is_dense: bool | None = None,
    ) -> None:
        self.role, self.model = role, tapped_module(model)
        self.adapter: Adapter = find_adapter(self.model)
        self.spec: InputSpec = input_spec(self.model)
        self.size = as_size(size) if size is not None else self.spec.size
        self.why_no_stages = ""
        found = self._dry_run()
        self.stages, self.classes, self.pooled, self.is_dense, yields_logits, self.yields_probabilities, _ = found
        if classes and found.of_one_pixel and not is_dense:
            raise ValueError(
                f"teacher_classes={classes}, but the {role} yields maps [B, {self.classes}, 1, 1]: flatten them, "
                "torch.nn.Sequential(model, torch.nn.Flatten(1))."
            )
        is_known = classes is not None or (is_dense and self.is_dense)
        is_feature = classes == 0 or (self.is_dense and is_dense is False)
        if self.classes is not None and (is_feature or not (is_known or self._ends_in_classifier())):
            self.pooled, self.classes = self.pooled or (None if self.is_dense else self.classes), None
        self.is_dense &= self.classes is not None
        if self.is_dense:
            self.stages = [stage for stage in self.stages if stage.name not in yields_logits]
        if classes and classes != self.classes:
            raise ValueError(f"teacher_classes={classes}, but the {role} yields {self.classes} numbers an image.")
        self.listed = self.stages  # of the adapter, without those that the user adds
        self.inputs = InputTransform(self.spec, self.size, normalized)
        self.names: list[str] = []
        self.placement = "device"  # or where the weights are instead, where they stay
        self.fingerprint: str | None = None  # of weights that are not all here

    def _dry_run(self) -> Probe:
        """Find the stages, and the channels of the images where the model's first layer does not tell."""
        refusals: list[Exception] = []
        for channels in dict.fromkeys((self.spec.channels, 3, 1)):
            try:
                found = self._probe(self._sample(channels))
            except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                refusals.append(error)
            else:
                self.spec = input_spec(self.model, channels)
                return found
        if getattr(self.model, "main_input_name", "") == "input_ids":  # Hugging Face's models of images and texts
            raise ValueError(
                f"the {self.role} {type(self.model).__name__} takes texts beside images: pass its part for images, as "
                "transformers.CLIPVisionModel.from_pretrained(...) loads CLIP's."
            ) from refusals[0]
        height, width = self.size
        raise ValueError(
            f"the {self.role} {architecture_name(self.model)} refuses images of {height} x {width} pixels: "
            f"{refusals[0]}. If it is the size: its own is {self.spec.size[0]} x {self.spec.size[1]}; "
            f"set input_size={{'{self.role}': ...}}."
        ) from refusals[0]

    def _ends_in_classifier(self) -> bool:
        """Say whether the output comes from a linear layer or convolution; an embedding does not count as logits."""
        is_known = is_segmenter if self.is_dense else is_from_library
        if is_known(self.model) or (self.role == "student" and not self.is_dense):
            return True
        is_classifier = output_is_convolution if self.is_dense else output_is_linear
        with torch.no_grad(), eval_mode(self.model):
            return is_classifier(self.model, self.adapter, self._sample(self.spec.channels))

    def _probe(self, sample: Tensor) -> Probe:
        try:
            return probe(self.adapter, self.model, sample)
        except NoSpatialFeatures as error:  # which a method on logits does not need
            self.why_no_stages = str(error)
            return probe(self.adapter, self.model, sample, stages=False)

    def add_stages(self, names: Sequence[str]) -> None:
        """Make modules of these paths stages too.

        Raises:
            ValueError: If a name is no path of a module, or no feature map comes out there.
        """
        listed = [stage.name for stage in self.stages]
        paths = (
            [path for path, _ in self.model.named_modules() if path] if isinstance(self.adapter, HookAdapter) else []
        )
        added = [name for name in names if name not in (*listed, POOLED)]
        for name in added:
            if name not in paths:
                raise unknown_name(f"{self.role} stage", name, {*listed, *paths, POOLED})
        if not added:
            return
        try:
            self.stages, *_ = probe(self.adapter, self.model, self._sample(self.spec.channels), added)
            self.listed = [stage for stage in self.stages if stage.name in listed]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"stages has {added} of the {self.role}, where no feature map comes out: {error}"
            ) from error

    @property
    def vector(self) -> Stage | None:
        """The vector before the classifier, as a stage of one pixel; ``None`` if there is none."""
        return None if self.pooled is None else Stage(POOLED, self.pooled, 1, 1)

    @property
    def all_stages(self) -> list[Stage]:
        """Every stage that can be chosen by name."""
        return [*self.stages, *([] if self.vector is None else [self.vector])]

    def _sample(self, channels: int) -> Tensor:
        # Three different images, so that a batch axis cannot be taken for anything else.
        images = torch.rand(3, channels, *self.size, generator=torch.Generator().manual_seed(0))
        return images.to(self._like())

    @property
    def labels(self) -> Labels | None:
        """The names of the model's classes, as far as it knows them."""
        return model_labels(self.model, self.classes)

    @property
    def title(self) -> str:
        """Name, family and input size, for the plan."""
        return f"{architecture_name(self.model)} ({self.adapter.family}, {self.size[0]} x {self.size[1]})"

    def select(self, names: list[str]) -> None:
        """Set the stages to tap; a stage may occur twice."""
        self.names = names
        self._distinct = [name for name in dict.fromkeys(names) if name != POOLED]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._like().device

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise raw images ``[B, C, H, W]``, in the dtype of the model."""
        return self.inputs(images).to(self._like().dtype)

    def _like(self) -> Tensor:
        tensors = (*self.model.parameters(), *self.model.buffers())
        # A quantised model begins with integers.
        return next((x for x in tensors if x.is_floating_point()), next(iter(tensors), torch.zeros(())))

    def run(self, images: Tensor) -> Features:
        """Run the model once on raw images ``[B, C, H, W]``; maps come in the order of `select`."""
        return self.run_prepared(self.prepare(images))

    def run_prepared(self, images: Tensor) -> Features:
        """Do the same for what `prepare` returned."""
        features = self.adapter.run(self.model, images, self._distinct)
        if len(features.maps) != len(self._distinct):
            raise RuntimeError(
                f"adapter {type(self.adapter).__name__} returned {len(features.maps)} feature maps for the stages "
                f"{self._distinct} of the {self.role}."
            )
        maps = dict(zip(self._distinct, features.maps, strict=True))
        if POOLED in self.names:
            is_vector = features.logits is not None and features.logits.ndim == 2
            if features.pooled is None and self.classes is None and is_vector:
                features = replace(features, pooled=features.logits)
            if features.pooled is None:
                raise RuntimeError(f"the {self.role} {type(self.model).__name__} did not yield its pooled vector.")
            maps[POOLED] = features.pooled[:, :, None, None]
        logits = None if self.classes is None else features.logits
        return replace(features, logits=logits, maps=tuple(maps[name] for name in self.names))

    def to(self, device: torch.device) -> None:
        """Move model and input transform; the dtype stays."""
        if self.placement == "device":
            self.model.to(device)
        self.inputs.to(device)


def refuse_frozen_graphs(role: str, model: nn.Module) -> None:
    """Raise TypeError for scripted and exported modules, which cannot be tapped, and for quantised students."""
    kind = "scripted (torch.jit)" if isinstance(model, torch.jit.ScriptModule) else ""
    if isinstance(model, torch.fx.GraphModule) and _is_exported(model):
        kind = "exported (torch.export)"
    if kind:
        raise TypeError(f"the {role} is {kind}: its modules cannot be tapped; pass the module that it was made of.")
    fixed = [
        name
        for name, module in model.named_modules()
        if ".ao.nn.quantized" in type(module).__module__ and not type(module).__name__.endswith("FloatFunctional")
    ]
    if role == "student" and fixed:
        raise TypeError(
            f"the student has quantised modules ({', '.join(fixed[:3])}), which do not learn: train the float module, "
            "and quantise it afterwards (hetkd.export(..., int8=True)), or use hetkd.simulate_int8."
        )


def _is_exported(model: nn.Module) -> bool:
    try:
        model.eval()
    except NotImplementedError:
        return True
    return False


def as_size(size: Any) -> tuple[int, int]:
    """Return height and width for ``input_size``, a number of pixels or a pair.

    Raises:
        ValueError: If it is neither, or not positive.
    """
    pair = (size, size) if isinstance(size, int) else size
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(v) is int and v > 0 for v in pair)):
        raise ValueError(f"input_size has {size!r}: give positive pixels, a number or (height, width).")
    return pair[0], pair[1]
