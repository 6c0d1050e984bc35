"""Sets a run up: data, optimizer, schedule, and how they are spread over devices and processes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from hetkd.cache.fingerprints import check_cache, fingerprint_data
from hetkd.cache.images import CachedImages
from hetkd.cache.records import TeacherCache
from hetkd.data.images import TensorImages, TransformedImages, length, make_loader
from hetkd.distillation import Distillation
from hetkd.training.accelerator import fused_update, prepare, uses_deepspeed
from hetkd.training.batches import Batches, TargetMaker, shared_out
from hetkd.training.checkpoint import RunFolder
from hetkd.training.classes import name_classes
from hetkd.training.evaluate import eval_loader, leave_unreadable_out, look_at_validation
from hetkd.training.look import look_at_data, remarks, take_classes, teachers_accuracy
from hetkd.training.options import TrainingOptions
from hetkd.training.run import Run
from hetkd.training.sharding import copy_for_sharding, place_teachers


def set_up(
    distillation: Distillation,
    train: Any,
    val: Any,
    epochs: int,
    folder: RunFolder | None,
    options: TrainingOptions,
    accelerator: Any,
) -> Run:
    """Make the parts of a run.

    Raises:
        ValueError: If the data do not fit the models, the method or the options.
    """
    from timm.utils import ModelEmaV3

    whole = distillation
    cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
    train_loader, val_loader, notes = _open_data(whole, train, val, options, cache)
    _refuse_presets_on_normalized(options, whole)
    mixing = TargetMaker(options, whole.classes)
    if accelerator.is_fsdp2 and not isinstance(val_loader, DataLoader | None):
        raise ValueError("val must be data or a DataLoader under FSDP, whose processes evaluate in step.")
    batches = Batches(train_loader, whole, mixing, options, accelerator, cache)
    place_teachers(whole.teachers, options.teacher_placement, accelerator)
    if accelerator.is_fsdp2:
        distillation = copy_for_sharding(whole)
    optimizer = _make_optimizer(distillation, options, accelerator)
    model, optimizer = prepare(distillation, optimizer, accelerator, options, batches.size)
    labelled = (train_loader, "train") if val is None else (val_loader, "val")
    said, teachers_top1 = teachers_accuracy(whole, *labelled) if cache is None else ([], {})
    notes += said
    if options.compile:
        distillation.compile()
    notes.insert(0, _said_at_the_start(batches, epochs, accelerator))
    if folder is not None and uses_deepspeed(accelerator):
        notes.append("DeepSpeed: students are saved after each epoch, but no checkpoint to resume from.")
    if val_loader is not None:
        look_at_validation(whole, val_loader)
    return Run(
        whole=whole,
        distillation=distillation,
        model=model,
        optimizer=optimizer,
        scheduler=_make_scheduler(optimizer.optimizer, options, epochs, batches.updates),
        ema=None if options.ema is None else ModelEmaV3(whole.student, decay=options.ema, use_warmup=True),
        train=batches,
        val=None if val_loader is None else shared_out(val_loader, "val", whole.classes, options.seed, accelerator),
        mixing=mixing,
        accelerator=accelerator,
        folder=folder,
        options=options,
        epochs=epochs,
        keeps_checkpoints=folder is not None and not uses_deepspeed(accelerator),
        fingerprints={} if folder is None else _fingerprints(train_loader, whole, notes),
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
    notes = _prepare_student(distillation, options) + name_classes(distillation, getattr(train_loader, "dataset", None))
    val_loader = None
    if val is not None:
        val_loader = eval_loader(distillation, val, 2 * options.batch_size, options.num_workers, options.keys, notes)
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

    size, spec = distillation.loading_size, distillation.student_inputs.spec
    if cache is not None:
        size, spec = cache.loading(size, spec)
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
        wrap=None if cache is None else with_cache,
    )


def _make_optimizer(distillation: Distillation, options: TrainingOptions, accelerator: Any) -> Any:
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    more = dict(options.optimizer_options or {})
    if not isinstance(options.optimizer, str):
        groups = param_groups_weight_decay(distillation, options.weight_decay, distillation.no_weight_decay())
        return options.optimizer(groups, lr=options.peak_lr, **more)
    # timm's "sgd" has Nesterov's momentum, which must not be 0.
    name = "momentum" if options.optimizer == "sgd" and not options.momentum else options.optimizer
    return create_optimizer_v2(
        distillation,
        opt=name,
        lr=options.peak_lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        **{**fused_update(options.optimizer, accelerator), **more},
    )


def _make_scheduler(optimizer: Any, options: TrainingOptions, epochs: int, updates: int | None) -> Any:
    """Make timm's schedule; ``None`` where the number of updates an epoch is unknown."""
    from timm.scheduler import create_scheduler_v2

    if updates is None:
        return None
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


def _fingerprints(loader: Iterable[Any], distillation: Distillation, notes: list[str]) -> dict[str, Any]:
    """Return what tells the training data and the teachers from others, for records of the run."""
    dataset: Any = getattr(loader, "dataset", None)
    digest = None
    if isinstance(dataset, (TransformedImages, TensorImages)):
        digest, again = fingerprint_data(dataset), fingerprint_data(dataset)
        if digest != again:
            digest = None
            notes.append("the training images differ from call to call (a generator of their own): no resume is exact")
    return {
        "train_images": length(dataset),
        "train_data": digest,
        "teachers": distillation.teachers.fingerprints(),
    }
