"""Parameter groups: weight decay, layer-wise learning rates, and another rate for the method's own parameters."""

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from hetkd.distillation import Distillation
from hetkd.features.hooks import find_classifier
from hetkd.training.accelerator import fused_update
from hetkd.training.options import TrainingOptions
from hetkd.utils.compiling import blocks


def make_optimizer(distillation: Distillation, options: TrainingOptions, accelerator: Any) -> Optimizer:
    """Make the optimizer of student and method."""
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    more, whole = dict(options.optimizer_options or {}), distillation.no_weight_decay()
    groups: Any = None
    if options.layer_decay is not None or options.method_lr is not None:
        groups = _groups_with_rates(distillation, options)
    if not isinstance(options.optimizer, str):
        groups = groups or param_groups_weight_decay(distillation, options.weight_decay, whole)
        made: Optimizer = options.optimizer(groups, lr=options.peak_lr, **more)
        return made
    # timm's "sgd" has Nesterov's momentum, which must not be 0.
    name = "momentum" if options.optimizer == "sgd" and not options.momentum else options.optimizer
    optimizer = create_optimizer_v2(
        groups or distillation,
        opt=name,
        lr=options.peak_lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        **{**fused_update(options.optimizer, accelerator), **more},
    )
    if isinstance(optimizer, SGD):
        optimizer.register_step_pre_hook(_fill_momentum)
    return optimizer


def _fill_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Begin all momenta at 0: PyTorch's fused SGD fails where a parameter gets its first gradient after others."""
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if "momentum_buffer" not in optimizer.state[parameter]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _groups_with_rates(distillation: Distillation, options: TrainingOptions) -> list[dict[str, Any]]:
    student, lr = distillation.student, options.peak_lr
    undecayed = {name.removeprefix("student.") for name in distillation.no_weight_decay()}
    layers = layers_of(student) if options.layer_decay is not None else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}

    def add(parameter: nn.Parameter, rate: float, *, decayed: bool) -> None:
        decay = options.weight_decay if decayed and parameter.ndim > 1 else 0.0
        # timm's schedules multiply their rates, also that of the warm-up and the least one, by lr_scale.
        new = {"params": [], "lr": lr, "lr_scale": rate / lr, "weight_decay": decay}
        group = groups.setdefault((rate, decay), new)
        if parameter.requires_grad:
            group["params"].append(parameter)

    for name, parameter in student.named_parameters():
        rate = lr * (options.layer_decay or 1.0) ** (last - layers.get(name, last))
        add(parameter, rate, decayed=name not in undecayed)
    for parameter in distillation.method.parameters():
        add(parameter, options.method_lr or lr, decayed=True)
    return [group for group in groups.values() if group["params"]]


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return the number of the layer of each parameter, from 0 at the images to the classifier.

    timm models say it themselves; in others each block with a hundredth of the weights or more is a layer.

    Example:
        >>> from torchvision.models import resnet18
        >>> layers = layers_of(resnet18())
        >>> layers["conv1.weight"], layers["layer3.1.conv2.weight"], layers["fc.weight"]
        (0, 4, 7)
    """
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        matcher: Any = model.group_matcher

        return dict(group_parameters(model, matcher(coarse=False), reverse=True))
    owner = {id(p): block for block in reversed(blocks(model)) for p in block.parameters()}
    classifier = find_classifier(model)
    head = {id(p) for p in ([] if classifier is None else classifier.parameters())}
    layers, number, current = {}, 0, None
    for name, parameter in model.named_parameters():
        block = owner.get(id(parameter))
        if block is not None and block is not current:
            number, current = number + 1, block
        layers[name] = number
    last = max(layers.values(), default=0) + 1
    return {name: last if id(p) in head else layers[name] for name, p in model.named_parameters()}


def class_weights(options: TrainingOptions, counts: torch.Tensor | None, classes: int | None) -> torch.Tensor | None:
    """Return the weights of the classes in the cross-entropy; balanced ones have mean 1 over the training data.

    Args:
        options: Say what is wanted.
        counts: How often each class occurs, see `hetkd.tasks.Task.class_counts`.
        classes: Of the student.

    Raises:
        ValueError: If there is another number of weights than of classes, or balanced ones lack counts.
    """
    if options.class_weights is None:
        return None
    if not isinstance(options.class_weights, str):
        weights = torch.tensor([float(x) for x in options.class_weights])
        if len(weights) != classes or not bool((weights >= 0).all()):
            raise ValueError(
                f"class_weights has {len(weights)} numbers from {weights.min():g} for {classes} classes; give one of "
                "at least 0 each."
            )
        return weights
    if counts is None:
        raise ValueError(
            "class_weights='balanced' needs labels that are known without loading each image: give a folder, a dataset "
            "with targets or tensors, or the weights themselves, class_weights=[1.0, 0.5, ...]."
        )
    return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts), 0.0).float()
