"""Sets a run up: data, optimizer, schedule, and how they are spread over devices and processes."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from hetkd.cache.fingerprints import check_cache, fingerprint_content, fingerprint_data, input_transforms
from hetkd.cache.images import CachedImages
from hetkd.cache.records import TeacherCache
from hetkd.data.images import TensorImages, TransformedImages, length, make_loader
from hetkd.data.labels import known_labels
from hetkd.distillation import Distillation
from hetkd.training.accelerator import prepare, uses_deepspeed
from hetkd.training.batches import Batches, TargetMaker, shared_out
from hetkd.training.checkpoint import RunFolder
from hetkd.training.classes import name_classes
from hetkd.training.evaluate import (
    eval_loader,
    is_measured_by_accuracy,
    leave_unreadable_out,
    look_at_images,
    refuse_nameless,
)
from hetkd.training.groups import class_weights, make_optimizer
from hetkd.training.look import look_at_data, remarks, take_classes, teachers_accuracy
from hetkd.training.options import TrainingOptions
from hetkd.training.run import Run
from hetkd.training.sharding import copy_for_sharding, place_teachers


def set_up(
    distillation: Distillation,
    train: Any,
    val: Any,
    epochs: int | None,
    folder: RunFolder | None,
    options: TrainingOptions,
    accelerator: Any,
) -> Run:
    """Make the parts of a run.

    Raises:
        ValueError: If the data do not fit the models, the method or the options.
    """
    from timm.utils import ModelEmaV3

    (whole := distillation).task.refuse_options(vars(options))
    cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
    train_loader, val_loader, notes = _open_data(whole, train, val, options, cache)
    _refuse_presets_on_normalized(options, whole)
    _weigh_classes(whole, options, getattr(train_loader, "dataset", None), accelerator.device)
    mixing = TargetMaker(options, whole.classes)
    if accelerator.num_processes > 1 and val_loader is not None:
        _refuse_in_processes(whole, val_loader, sharded=accelerator.is_fsdp2)
    batches = Batches(train_loader, whole, mixing, options, accelerator, cache)
    epochs = _whole_epochs(epochs, options, batches.count)
    place_teachers(whole.teachers, options.teacher_placement, accelerator)
    if accelerator.is_fsdp2:
        distillation = copy_for_sharding(whole)
    optimizer = make_optimizer(distillation, options, accelerator)
    model, optimizer = prepare(distillation, optimizer, accelerator, options, batches.size)
    labelled = (train_loader, "train") if val is None else (val_loader, "val")
    said, teachers_top1 = teachers_accuracy(whole, *labelled) if cache is None else ([], {})
    if options.compile:
        distillation.compile()
    notes = [_said_at_the_start(batches, epochs, accelerator), *notes, *said]
    if folder is not None and uses_deepspeed(accelerator):
        notes.append("DeepSpeed: students are saved after each epoch, but no checkpoint to resume from.")
    if val_loader is not None:
        look_at_images(whole, val_loader, "val")
    return Run(
        whole=whole,
        distillation=distillation,
        model=model,
        optimizer=optimizer,
        scheduler=_make_scheduler(optimizer.optimizer, options, epochs, batches.updates),
        ema=None if options.ema is None else ModelEmaV3(whole.student, decay=options.ema, use_warmup=True),
        train=batches,
        val=None if val_loader is None else shared_out(val_loader, "val", whole, options.seed, accelerator),
        mixing=mixing,
        accelerator=accelerator,
        folder=folder,
        options=options,
        epochs=epochs,
        keeps_checkpoints=folder is not None and not uses_deepspeed(accelerator),
        fingerprints={} if folder is None else _fingerprints(train_loader, val_loader, whole, notes),
        notes=notes,
        teachers_top1=teachers_top1,
        kept_in_eval=_kept_in_eval(distillation.student),
    )


def _open_data(
    distillation: Distillation, train: Any, val: Any, options: TrainingOptions, cache: TeacherCache | None
) -> tuple[Iterable[Any], Iterable[Any] | None, list[str]]:
    """Return the loaders of both splits, whose labels are the student's classes, and what to tell the user."""
    train_loader = _train_loader(distillation, train, options, cache)
    surveys = look_at_data({"train": train_loader})
    take_classes(distillation, surveys)
    trained = getattr(train_loader, "dataset", None)
    notes = _prepare_student(distillation, options) + name_classes(distillation, train_loader)
    notes += distillation.task.remarks(trained)
    val_loader = None
    if val is not None:
        val_loader = eval_loader(distillation, val, 2 * options.batch_size, options.num_workers, options.keys, notes)
        refuse_nameless(distillation, trained, val_loader)
        if options.unreadable == "skip":
            leave_unreadable_out(val_loader, notes)
        surveys += look_at_data({"val": val_loader})
    return train_loader, val_loader, notes + [str(each) for each in surveys] + remarks(distillation, surveys)


def _prepare_student(distillation: Distillation, options: TrainingOptions) -> list[str]:
    """Turn a student in half precision to float32, whose small updates are not rounded away; return what to tell."""
    notes, student = [], distillation.student
    half = {str(p.dtype) for p in student.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if half and not options.half_weights:
        student.float()
        notes.append(f"the student's weights are {half.pop().removeprefix('torch.')}: they are trained in float32")
    if hasattr(student, "peft_config"):
        notes.append("the student is a PEFT model, whose files have PEFT's keys: merge_and_unload() makes it plain")
    return notes


def _refuse_presets_on_normalized(options: TrainingOptions, distillation: Distillation) -> None:
    if isinstance(options.augment, str) and distillation.normalized:
        raise ValueError(
            f"augment={options.augment!r} works on images in [0, 1], but normalized=... says that the loader has "
            "normalised them: augment in the loader, or leave its normalisation and normalized=... out."
        )


def _refuse_in_processes(distillation: Distillation, val: Iterable[Any], *, sharded: bool) -> None:
    by_accuracy = is_measured_by_accuracy(distillation, val)
    if not isinstance(val, DataLoader) and (sharded or not by_accuracy):
        raise ValueError("val must be data or a DataLoader here, so that all processes evaluate in step.")
    if sharded and not by_accuracy:
        raise ValueError("without labels that teach, no student is measured under FSDP: leave val out.")


def _weigh_classes(distillation: Distillation, options: TrainingOptions, dataset: Any, device: torch.device) -> None:
    """Weigh the cross-entropy; a list is in the order of the data's classes, if it has as many weights."""
    classes, is_balanced = distillation.classes, isinstance(options.class_weights, str)
    counts = distillation.task.class_counts(dataset, classes) if is_balanced and classes else None
    weights = class_weights(options, counts, classes)
    order = getattr(dataset, "label_map", None)
    if weights is not None and not is_balanced and order is not None and len(order) == len(weights):
        weights = torch.empty_like(weights).index_copy_(0, torch.tensor(order), weights)
    distillation.method.class_weights = None if weights is None else weights.to(device)


def _whole_epochs(epochs: int | None, options: TrainingOptions, count: int | None) -> int:
    """Return the number of epochs, the last of which may end early, of a run of so many batches an epoch."""
    if options.max_steps is None:
        assert epochs is not None, "fit has looked"
        return epochs
    needed = options.max_steps if count is None else math.ceil(options.max_steps / count)
    return needed if epochs is None else min(epochs, needed)


def _said_at_the_start(batches: Batches, epochs: int, accelerator: Any) -> str:
    processes = accelerator.num_processes
    images = batches.size * batches.options.gradient_accumulation * processes
    where = f"{processes} process{'es' * (processes > 1)} on {accelerator.device.type}"
    return f"{where}, {images} images an update, {epochs} epoch{'s' * (epochs > 1)}"


def _kept_in_eval(student: nn.Module) -> list[nn.Module]:
    """Return the modules in eval mode of a student in training mode, and frozen ones in eval mode of any student.

    A student that is in eval mode as a whole comes so from a library that loads weights; all of it is to be trained.
    """
    in_eval = [module for module in student.modules() if not module.training]
    if student.training:
        return in_eval
    return [
        m
        for m in in_eval
        if next(m.parameters(), None) is not None and not any(p.requires_grad for p in m.parameters())
    ]


def _train_loader(
    distillation: Distillation, train: Any, options: TrainingOptions, cache: TeacherCache | None
) -> Iterable[Any]:
    def with_cache(dataset: TransformedImages) -> CachedImages:
        assert cache is not None
        cache.verify()
        check_cache(cache, distillation.teachers, dataset)
        return CachedImages(dataset, cache)

    if options.balanced_sampling and isinstance(train, DataLoader):
        raise ValueError("balanced_sampling=True is for data; a loader has a sampler of its own.")
    if options.class_weights is not None and not distillation.method.ce_weight:
        raise ValueError("class_weights weigh the cross-entropy, but ce_weight=0 leaves it out.")
    size, spec = distillation.loading_size, distillation.student_inputs.spec
    min_crop = distillation.task.min_crop if options.min_crop is None else options.min_crop
    if cache is not None:
        size, spec = cache.loading(size, spec)
        min_crop = (cache.about.get("loading") or {}).get("min_crop", min_crop)
    return make_loader(
        train,
        what="train",
        size=size,
        spec=spec,
        batch_size=options.batch_size,
        train=True,
        num_workers=options.num_workers,
        seed=options.seed if cache is None else cache.about["seed"],
        skip_unreadable=options.unreadable == "skip",
        keys=options.keys,
        min_crop=min_crop,
        sampler=_balanced_sampler if options.balanced_sampling else None,
        wrap=None if cache is None else with_cache,
        make=distillation.task.make_dataset,
    )


def _balanced_sampler(dataset: Any) -> WeightedRandomSampler:
    """Draw images so that each class comes equally often."""
    labels = known_labels(dataset)
    if labels is None:
        raise ValueError("balanced_sampling=True needs labels that are known without loading each image.")
    weights = 1 / labels.bincount().double()[labels]
    return WeightedRandomSampler(weights.tolist(), len(labels))


def _make_scheduler(optimizer: Any, options: TrainingOptions, epochs: float, updates: int | None) -> Any:
    """Make timm's schedule; ``None`` where the number of updates is unknown."""
    from timm.scheduler import create_scheduler_v2

    last = None if options.max_steps is None else math.ceil(options.max_steps / options.gradient_accumulation)
    if updates is None:
        epochs, updates = 1, last
    elif last is not None:
        epochs = min(epochs, last / updates)
    if updates is None:  # then the rates stay as they are
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return None
    if options.max_steps is not None and options.warmup_epochs >= epochs:
        raise ValueError(
            f"warmup_epochs={options.warmup_epochs:g} is not over after max_steps={options.max_steps}: make it shorter."
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.scheduler,
        num_epochs=epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_prefix=False,
        warmup_lr=options.warmup_lr or options.peak_lr / 100,
        min_lr=min(options.min_lr, options.peak_lr),
        step_on_epochs=False,
        decay_epochs=options.decay_epochs,
        decay_rate=1.0 if options.scheduler == "poly" else options.decay_rate,
        updates_per_epoch=updates,
    )
    return scheduler


def _fingerprints(train: Any, val: Any, distillation: Distillation, notes: list[str]) -> dict[str, Any]:
    """Return what tells data, teachers and input transforms from others, for records of the run."""
    dataset, digest = getattr(train, "dataset", None), None
    if isinstance(dataset, (TransformedImages, TensorImages)):
        digest, again = fingerprint_data(dataset), fingerprint_data(dataset)
        if digest != again:
            digest = None
            notes.append("the training images differ from call to call (a generator of their own): no resume is exact")
    return {
        "train_images": length(dataset),
        "train_data": digest,
        "train_content": _content(dataset),
        "val_content": _content(getattr(val, "dataset", None)),
        "inputs": input_transforms(list(distillation.taps.values())),
        "teachers": distillation.teachers.fingerprints(),
    }


def _content(dataset: Any) -> str | None:
    return fingerprint_content(dataset) if isinstance(dataset, (TransformedImages, TensorImages)) else None
