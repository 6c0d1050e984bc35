"""The training loop on Hugging Face Accelerate."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hetkd.distributed import largest_of_processes
from hetkd.inputs import check_labels
from hetkd.training.checkpoint import BEST, LAST, Checkpoint, RunFolder
from hetkd.training.data import TensorImages, TransformedImages, has_labels, images_and_labels, length, make_loader
from hetkd.training.evaluate import eval_loader, measure
from hetkd.training.memory import freed_memory_kept, give_back_freed_memory
from hetkd.training.options import TrainingOptions
from hetkd.training.packing import lay_out_as_parameters, pack, unpack, with_prefix, without_prefix
from hetkd.training.parallel import (
    copy_for_sharding,
    fused_update,
    load_sharded_state,
    local_part,
    make_accelerator,
    only_used_parameters,
    place_teachers,
    prepare,
    sharded_state,
    share_buffers,
    unsharded_weights,
    uses_deepspeed,
)
from hetkd.training.progress import TrainingProgress
from hetkd.training.random_state import random_state, restore_random_state
from hetkd.training.signals import Signals
from hetkd.training.targets import TargetMaker
from hetkd.training.teacher_cache import CachedImages, TeacherCache, fingerprint_data, fingerprint_teachers
from hetkd.training.terms import Terms, TrainingDiverged

if TYPE_CHECKING:
    from hetkd.distiller import Distiller


FREE_SETTINGS = {
    "epochs",
    "versions",
    "progress",
    "log_every",
    "num_workers",
    "cpu",
    "augment",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep_last",
    "keep_best",
    "returns",
    "teacher_placement",
    "compile",
    "keep_memory",
    "trackers",
    "unreadable",
}
"""What may differ between a run and its resumption without a word."""
OTHER_PROCESSES = {"processes", "effective_batch_size"}
"""What may differ, and is said."""


@dataclass
class FitResult:
    """What a training run yields.

    Attributes:
        history: One record an epoch: ``epoch`` (from 1), ``lr``, ``train/TERM`` (mean of each loss
            term), ``images_per_second``, ``seconds``, and with validation data ``top1``, ``top5``, ``loss``.
        best: The record with the highest ``top1`` (without validation data: the last one).
        output_dir: Where files went, or ``None``.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    output_dir: Path | None = None


def fit(
    distiller: Distiller,
    train: Any,
    val: Any,
    *,
    epochs: int,
    output_dir: str | Path | None,
    resume: bool,
    options: dict[str, Any],
) -> FitResult:
    """Trains; see `hetkd.Distiller.fit`."""
    checked = TrainingOptions.from_mapping(options)
    if not (isinstance(epochs, int) and epochs >= 1):
        raise ValueError(f"epochs={epochs!r} must be a whole number of at least 1.")
    if not any(parameter.requires_grad for parameter in distiller.student.parameters()):
        raise ValueError("all parameters of the student are frozen: call student.requires_grad_(True).")
    if resume and output_dir is None:
        raise ValueError("resume=True needs the output_dir of the run to go on with.")
    if output_dir is None:
        for name in ("returns", "checkpoint_steps"):
            if getattr(checked, name):
                raise ValueError(f"{name}={getattr(checked, name)} needs an output_dir, where checkpoints go.")
    if checked.warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs={checked.warmup_epochs} is more than epochs={epochs}.")
    folder = None if output_dir is None else RunFolder(output_dir, resume=resume, keep_last=checked.keep_last)
    accelerator = make_accelerator(checked, None if folder is None else folder.path)
    # A student that FSDP is to shard may not fit on one device.
    device = torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device
    keep_memory = checked.keep_memory and accelerator.device.type == "cpu"
    with only_used_parameters(distiller, device), freed_memory_kept(enabled=keep_memory):
        return _Run(distiller, train, val, epochs, folder, checked, accelerator).run(resume)


class _Run:
    """One training run: what is made once, and the steps that use it."""

    def __init__(
        self,
        distiller: Distiller,
        train: Any,
        val: Any,
        epochs: int,
        folder: RunFolder | None,
        options: TrainingOptions,
        accelerator: Any,
    ) -> None:
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        self.epochs, self.folder, self.options, self.accelerator = epochs, folder, options, accelerator
        self.device: torch.device = accelerator.device
        self.whole = self.distiller = distiller
        self.notes: list[str] = []
        self.cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
        train_loader = self._train_loader(train)
        val_loader = None if val is None else eval_loader(distiller, val, 2 * options.batch_size, options.num_workers)
        self.targets = TargetMaker(options, distiller)
        self.has_labels = has_labels(train_loader)
        if self.has_labels is False:
            self._refuse_missing_labels()
        self.batch_size = getattr(train_loader, "batch_size", None) or options.batch_size
        if accelerator.is_fsdp2 and not isinstance(val_loader, DataLoader | None):
            raise ValueError("val must be data or a DataLoader under FSDP, whose processes evaluate in step.")
        self._check_last_batch(train_loader)
        self.train = self._prepared(train_loader)
        self.val = None if val_loader is None else self._prepared(val_loader)
        self.batches, self.updates = self._count_batches(train_loader)
        place_teachers(distiller, options.teacher_placement, accelerator)
        if accelerator.is_fsdp2:
            self.distiller = copy_for_sharding(distiller)
        optimizer = create_optimizer_v2(
            self.distiller,
            opt=options.optimizer,
            lr=options.peak_lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **fused_update(options.optimizer, accelerator),
        )
        self.model, self.optimizer = prepare(self.distiller, optimizer, accelerator, options, self.batch_size)
        if options.compile:
            self.distiller.compile()
        self.scheduler = self._make_scheduler()
        self.ema = None if options.ema is None else ModelEmaV3(distiller.student, decay=options.ema, use_warmup=True)
        self.keeps_checkpoints = folder is not None
        if folder is not None and uses_deepspeed(accelerator):
            self.keeps_checkpoints = False
            self.notes.append("DeepSpeed: students are saved after each epoch, but no checkpoint to resume from.")
        self.fingerprints = {} if folder is None else self._fingerprints(train_loader)
        self.result = FitResult(output_dir=None if folder is None else folder.path)
        self.first_epoch = 0
        self.update = 0
        self.steps = 0  # of the whole run: the numbers of checkpoints
        self.best_checkpoint: int | None = None
        self.interrupted: _Interrupted | None = None
        self.returned = 0
        self.saved_at, self.saved_step, self.overdue = time.monotonic(), 0, False

    def _train_loader(self, train: Any) -> Iterable[Any]:
        options = self.options
        return make_loader(
            train,
            what="train",
            size=self.distiller.loading_size,
            spec=self.distiller.student_inputs.spec,
            batch_size=options.batch_size,
            train=True,
            num_workers=options.num_workers,
            seed=options.seed if self.cache is None else self.cache.about["seed"],
            skip_unreadable=options.unreadable == "skip",
            wrap=None if self.cache is None else self._with_cache,
        )

    def _fingerprints(self, loader: Iterable[Any]) -> dict[str, Any]:
        """Returns what tells the training data and the teachers from others, for records of the run."""
        dataset: Any = getattr(loader, "dataset", None)
        own = isinstance(dataset, (TransformedImages, TensorImages))
        return {
            "train_images": length(dataset),
            "train_data": fingerprint_data(dataset) if own else None,
            "teachers": fingerprint_teachers(self.distiller),
        }

    def _with_cache(self, dataset: TransformedImages) -> CachedImages:
        assert self.cache is not None
        self.cache.verify()
        self.cache.check(self.distiller, dataset)
        return CachedImages(dataset, self.cache)

    def _prepared(self, loader: Iterable[Any]) -> Any:
        """Shares a loader out to the processes; other iterables are each process's own."""
        if not isinstance(loader, DataLoader):
            return loader
        labels = loader.dataset.labels if isinstance(loader.dataset, TensorImages) else None
        if labels is not None:  # all of them are at hand: look before any training
            check_labels(labels, len(labels), self.distiller.classes, look_at_values=True)
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def _check_last_batch(self, loader: Iterable[Any]) -> None:
        """Refuses, before any training, a last batch that batch statistics or mixing cannot use."""
        if not isinstance(loader, DataLoader) or loader.drop_last or not loader.batch_size:
            return
        last = (length(loader.dataset) or 0) % loader.batch_size
        if last == 1 and self.distiller.method.needs_batch:
            raise ValueError(
                "the last batch of train has one image, which has no batch statistics: use drop_last=True."
            )
        if last % 2 and self.targets.mix is not None:
            raise ValueError(f"the last batch of train has {last} images, but mixing needs pairs: use drop_last=True.")

    def _count_batches(self, loader: Iterable[Any]) -> tuple[int | None, int | None]:
        """Returns batches and updates an epoch, if known beforehand."""
        batches, accumulation = length(self.train), self.options.gradient_accumulation
        if batches is None:
            if self.options.scheduler != "constant" or self.options.warmup_epochs:
                raise ValueError(
                    "train is a loader without a length: its schedule is unknown; use scheduler='constant' and no "
                    "warmup_epochs."
                )
            return None, None
        if not isinstance(loader, DataLoader):
            # Of any other iterable Accelerate does not see the end: batches that make no whole update are left out.
            batches -= batches % accumulation
            if not batches:
                raise ValueError(f"train has fewer batches than gradient_accumulation={accumulation}.")
        return batches, math.ceil(batches / accumulation)

    def _make_scheduler(self) -> Any:
        from timm.scheduler import create_scheduler_v2

        if self.updates is None:
            return None
        scheduler, _ = create_scheduler_v2(
            self.optimizer.optimizer,
            sched=self.options.scheduler,
            num_epochs=self.epochs,
            warmup_epochs=self.options.warmup_epochs,
            warmup_prefix=False,
            warmup_lr=self.options.warmup_lr or self.options.peak_lr / 100,
            min_lr=min(self.options.min_lr, self.options.peak_lr),
            step_on_epochs=False,
            decay_epochs=self.options.decay_epochs,
            decay_rate=1.0 if self.options.scheduler == "poly" else self.options.decay_rate,
            updates_per_epoch=self.updates,
        )
        return scheduler

    def run(self, resume: bool) -> FitResult:
        try:
            if resume and not self.keeps_checkpoints and self.folder and self.folder.load_settings():
                raise ValueError(
                    f"resume=True, but the run in {self.result.output_dir} has no checkpoint under DeepSpeed."
                )
            if resume:
                self._refuse_other_settings()
                self._restore()
            if self.first_epoch + (self.interrupted is not None) > self.epochs:
                raise ValueError(f"epochs={self.epochs}, but the run has trained more than that already.")
            if self.folder is not None and self.accelerator.is_main_process:
                self.folder.start(self._settings(), str(self.distiller.plan))
            self._start_trackers()
            show = self.options.progress and self.accelerator.is_main_process
            step = 0 if self.interrupted is None else self.interrupted.step
            with (
                TrainingProgress(self.epochs, self.batches, self.first_epoch, step, enabled=show) as progress,
                Signals(enabled=self.keeps_checkpoints) as self.signals,
            ):
                for note in self.notes:
                    progress.note(note)
                if self.steps:
                    progress.note(f"going on after epoch {self.first_epoch}" + (f", step {step}" if step else ""))
                self._epochs(progress)
            if self.ema is not None:
                self.distiller.student.load_state_dict(self.ema.module.state_dict())
            if self.accelerator.is_fsdp2:
                self.whole.load_state_dict(unsharded_weights(self.model))
        finally:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.result

    def _start_trackers(self) -> None:
        if self.options.trackers:
            simple = {name: x for name, x in self._settings().items() if isinstance(x, (bool, int, float, str))}
            self.accelerator.init_trackers("hetkd", config=simple)

    def _epochs(self, progress: TrainingProgress) -> None:
        """Trains what is left, and goes back to the last checkpoint as often as ``returns`` allows."""
        while self.first_epoch < self.epochs:
            try:
                self._epoch(self.first_epoch, progress)
            except TrainingDiverged as error:
                if self.folder is None or self.returned >= self.options.returns:
                    raise
                self.returned += 1
                progress.note(f"{error} Going back to the last checkpoint ({self.returned} of {self.options.returns}).")
                self._restore(go_back=True)
            else:
                self.first_epoch += 1

    def _refuse_other_settings(self) -> None:
        before = None if self.folder is None else self.folder.load_settings()
        if before is None:
            return
        now = json.loads(json.dumps(self._settings(), default=str))
        changed = {
            name: f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name not in FREE_SETTINGS and before.get(name) != value
        }
        if before.get("epochs") != now["epochs"]:
            self.notes.append(f"epochs was {before.get('epochs')} and is {now['epochs']}: the schedule changes.")
        if before.get("processes") != now["processes"]:
            self.notes += [changed.pop(name) for name in OTHER_PROCESSES & set(changed)]
        differences = list(changed.values())
        if differences:
            raise ValueError(f"resume=True, but the run in {self.result.output_dir} differs: {'; '.join(differences)}.")

    def _settings(self) -> dict[str, Any]:
        return {
            "plan": self.distiller.plan.title,
            "method": self.distiller.method.settings(),
            "epochs": self.epochs,
            "effective_batch_size": self.batch_size
            * self.options.gradient_accumulation
            * self.accelerator.num_processes,
            "processes": self.accelerator.num_processes,
            "sharded": self.accelerator.is_fsdp2,
            **self.fingerprints,
            "versions": {name: version(name) for name in ("hetkd", "torch", "timm", "accelerate")},
            **self.options.settings(),
        }

    def _epoch(self, epoch: int, progress: TrainingProgress) -> None:
        means, images, seconds = self._train_epoch(epoch, progress)
        record = {
            "epoch": float(epoch + 1),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            **{f"train/{name}": value for name, value in means.items()},
            "images_per_second": images * self.accelerator.num_processes / seconds,
            "seconds": seconds,
        }
        self._report_unreadable(record, progress)
        student = self.distiller.student if self.ema is None else self.ema.module
        if self.accelerator.num_processes > 1:
            share_buffers(self.distiller)
            if self.ema is not None:
                share_buffers(self.ema.module)
        if self.val is not None:
            give_back_freed_memory()
            record |= measure(self.distiller, student, self.val, self.device, self.accelerator)
        self.result.history.append(record)
        self.accelerator.log(record, step=epoch + 1)
        progress.epoch_done(record)
        is_best = self.val is None or record["top1"] > self.result.best.get("top1", -1.0)
        if is_best:
            self.result.best, self.best_checkpoint = record, self.steps
        self._save(epoch, student, is_best)

    def _report_unreadable(self, record: dict[str, float], progress: TrainingProgress) -> None:
        dataset = getattr(self.train, "dataset", None)
        if not (isinstance(dataset, TransformedImages) and dataset.skip_unreadable):
            return
        unreadable = self.accelerator.reduce(dataset.unreadable.to(self.device, torch.int32))
        bad = unreadable.nonzero()[:, 0].tolist()
        record["unreadable_images"] = float(len(bad))
        if bad:
            some = ", ".join(dataset.name_of(index) for index in bad[:5]) + (", ..." if len(bad) > 5 else "")
            progress.note(f"{len(bad)} images cannot be read and were skipped: {some}")

    def _train_epoch(self, epoch: int, progress: TrainingProgress) -> tuple[dict[str, float], int, float]:
        """Trains one epoch, or what is left of it; returns means of the terms, images seen, and seconds."""
        from accelerate.utils import set_seed

        seed = self.options.seed + epoch * self.accelerator.num_processes + self.returned * 1_000_003
        set_seed(seed, device_specific=True)
        give_back_freed_memory()
        self.model.train()
        part, self.interrupted = self.interrupted or _Interrupted(), None
        terms = Terms(self.folder, part.names, part.sums, part.count)
        images_seen, since, step = part.images, time.perf_counter() - part.seconds, part.step
        for step, (images, labels, targets) in enumerate(self._batches(epoch, part.step), start=part.step + 1):
            if part.random is not None:  # as it was after the last step before the interruption
                restore_random_state(part.random)
                part.random = None
            self._step(epoch, step, images, labels, targets, terms)
            images_seen += len(images)
            self.steps += 1
            progress.step()
            if step % self.options.log_every == 0:
                newest = terms.read()
                speed = images_seen * self.accelerator.num_processes / (time.perf_counter() - since)
                progress.show(epoch, newest, speed)
            if step != self.batches and self._is_due(step):
                terms.read()
                self._refuse_broken_weights(epoch)
                seconds = time.perf_counter() - since
                self._save_checkpoint(
                    epoch, _Interrupted(step, images_seen, seconds, terms.names, terms.sums, terms.count)
                )
                self.signals.obey()
        if step == 0:
            raise ValueError("train is empty: its loader yields no batch.")
        terms.read()
        self._refuse_broken_weights(epoch)
        return terms.means(self.accelerator), images_seen, time.perf_counter() - since

    def _refuse_broken_weights(self, epoch: int) -> None:
        """Keeps weights that are no numbers out of checkpoints and evaluations."""
        named = self.distiller.named_parameters()
        broken = next((repr(name) for name, parameter in named if not local_part(parameter).isfinite().all()), None)
        if largest_of_processes(int(broken is not None), self.device):
            raise TrainingDiverged(
                f"the weight {broken or 'of another process'} became NaN or Inf in epoch {epoch + 1}: try a lower lr "
                "or clip_grad=1.0."
            )

    def _is_due(self, step: int) -> bool:
        """Says, alike in all processes, whether a checkpoint is to be written after this step."""
        if not self.keeps_checkpoints:
            return False
        every, minutes = self.options.checkpoint_steps, self.options.checkpoint_minutes
        by_steps = every is not None and self.steps - self.saved_step >= every
        if by_steps or self.accelerator.num_processes == 1 or step % self.options.log_every == 0:
            self.signals.agree(self.device)
            overdue = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
            self.overdue = bool(largest_of_processes(int(overdue), self.device))
        is_due = by_steps or self.overdue or self.signals.agreed is not None
        return is_due and bool(self.accelerator.sync_gradients)  # accumulated gradients are not kept

    def _batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor | None, dict[str, Tensor] | None]]:
        """Yields the batches of an epoch from number ``skip`` on, with the teacher's targets if they are cached."""
        for batch in self._loader(epoch, skip):
            targets = None
            if self.cache is not None:
                images, labels, records = batch
                labels = labels if self.has_labels else None
                targets = self.cache.targets({name: x.to(self.device) for name, x in records.items()})
            else:
                images, labels = images_and_labels(batch)
            if labels is None:
                self._refuse_missing_labels()
                yield images.to(self.device, non_blocking=True), None, targets
                continue
            if isinstance(images, Tensor) and isinstance(labels, Tensor):
                # Here the labels are still on the CPU, where looking at them costs nothing.
                check_labels(labels, len(images), self.distiller.classes, labels.device.type == "cpu")
                images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield images, labels, targets

    def _refuse_missing_labels(self) -> None:
        if self.distiller.method.ce_weight:
            raise ValueError("train has no labels: use ce_weight=0 to learn from the teacher alone.")
        if self.targets.mix is not None or self.targets.smoothing:
            raise ValueError("mixup, cutmix and label_smoothing need labels, but train has none.")

    def _loader(self, epoch: int, skip: int) -> Iterable[Any]:
        from accelerate import skip_first_batches

        dataset = getattr(self.train, "dataset", None)
        order = epoch + self.returned * 1_000_003  # another one after each return
        if isinstance(dataset, TransformedImages):
            dataset.start_epoch(order)
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(order)
        if not skip and isinstance(self.train, DataLoader):
            return self.train
        # Of these, what a batch holds depends on nothing before it.
        if isinstance(dataset, (TransformedImages, TensorImages)):
            rest = skip_first_batches(self.train, skip)
            rest.set_epoch(order)
            return rest
        return itertools.islice(self.train, skip, self.batches)

    def _step(
        self,
        epoch: int,
        step: int,
        images: Tensor,
        labels: Tensor | None,
        targets: dict[str, Tensor] | None,
        terms: Terms,
    ) -> None:
        images, labels = self.targets(images, labels)
        with self.accelerator.accumulate(self.model):
            if self.accelerator.sync_gradients and self.scheduler is not None:
                self.scheduler.step_update(self.update)
            try:
                output = self.model(images, labels, targets)
                self.accelerator.backward(output.loss)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(_out_of_memory(len(images), self.options)) from error
            terms.add(epoch, step, output.terms)
            if self.accelerator.sync_gradients and self.options.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.options.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.update += 1
            if self.ema is not None:
                self.ema.update(self.distiller.student, step=self.update)

    def _save(self, epoch: int, student: nn.Module, is_best: bool) -> None:
        """Saves students and history at the end of an epoch, and a checkpoint."""
        if self.folder is None:
            return
        if self.accelerator.is_fsdp2:
            self.whole.load_state_dict(unsharded_weights(self.model))
            student = self.whole.student
        if self.accelerator.is_main_process:
            if is_best:
                self.folder.save_student(student, BEST)
            self.folder.save_student(student, LAST)
            self.folder.save_history(self.result.history)
        if self.keeps_checkpoints:
            self._save_checkpoint(epoch + 1, _Interrupted())
        self.signals.agree(self.device)
        self.signals.obey()

    def _save_checkpoint(self, epoch: int, part: _Interrupted) -> None:
        """Writes a checkpoint: whole epochs, and as much of the next one as ``part`` says."""
        assert self.folder is not None
        weights, moments = self._state()
        if self.accelerator.is_main_process:
            self.folder.open_checkpoint(self.steps)
        self.accelerator.wait_for_everyone()
        self.folder.save_random(self.steps, self.accelerator.process_index, random_state())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            optimizer_tensors, optimizer_values = pack(moments)
            tensors = {
                **with_prefix("distiller.", weights),
                **with_prefix("optimizer.", optimizer_tensors),
                **({} if self.ema is None else with_prefix("ema.", self.ema.module.state_dict())),
                **({} if part.sums is None else {"terms": part.sums}),
            }
            values = {
                "epoch": epoch,
                "step": part.step,
                "images": part.images,
                "seconds": part.seconds,
                "names": part.names,
                "count": part.count,
                "steps": self.steps,
                "update": self.update,
                "returned": self.returned,
                "optimizer": optimizer_values,
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "history": self.result.history,
                "best": self.result.best,
                "best_checkpoint": self.best_checkpoint,
                "settings": self._settings(),
            }
            keep = self.best_checkpoint if self.options.keep_best else None
            self.folder.save_checkpoint(self.steps, tensors, json.loads(json.dumps(values, default=str)), keep)
        self.accelerator.wait_for_everyone()
        self.saved_at, self.saved_step, self.overdue = time.monotonic(), self.steps, False

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the state dicts of distiller and optimizer; of a sharded one whole, in the first process."""
        if self.accelerator.is_fsdp2:
            return sharded_state(self.model, self.optimizer.optimizer)
        return self.distiller.state_dict(), self.optimizer.state_dict()

    def _restore(self, *, go_back: bool = False) -> None:
        saved = None if self.folder is None else self.folder.load_checkpoint()
        if saved is None:
            if go_back:
                raise TrainingDiverged("the training diverged before its first checkpoint: try a lower lr.")
            return
        values = saved.values
        self.returned = max(self.returned, values["returned"])
        weights = without_prefix("distiller.", saved.tensors)
        moments = unpack(without_prefix("optimizer.", saved.tensors), values["optimizer"])
        if self.accelerator.is_fsdp2:
            load_sharded_state(self.model, self.optimizer.optimizer, weights, moments)
        else:
            self.distiller.load_state_dict(weights)
            self.optimizer.load_state_dict(moments)
            lay_out_as_parameters(self.optimizer.optimizer)
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(without_prefix("ema.", saved.tensors))
        self.first_epoch, self.update, self.steps = values["epoch"], values["update"], values["steps"]
        self.saved_step = self.steps
        self.optimizer.optimizer.zero_grad()  # of steps that went wrong
        self.accelerator.step = 0
        self.result.history, self.result.best = values["history"], values["best"]
        self.best_checkpoint = values["best_checkpoint"]
        if values["step"]:
            self.interrupted = self._interrupted(saved)

    def _interrupted(self, saved: Checkpoint) -> _Interrupted:
        values, processes = saved.values, self.accelerator.num_processes
        step, images = values["step"], values["images"]
        before = values["settings"]["processes"]
        if before != processes:  # the same part of the epoch, in batches of now
            step, images = step * before // processes, images * before // processes
        return _Interrupted(
            step,
            images,
            values["seconds"],
            values["names"],
            saved.tensors["terms"],
            values["count"],
            saved.random.get(self.accelerator.process_index) if before == processes else None,
        )


@dataclass
class _Interrupted:
    """How far an epoch got before an interruption; by default not at all."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    sums: Tensor | None = None
    count: int = 0
    random: dict[str, Tensor] | None = None


def _out_of_memory(batch: int, options: TrainingOptions) -> str:
    accumulation = 2 * options.gradient_accumulation
    return (
        f"a batch of {batch} images does not fit in memory: batch_size={max(1, batch // 2)} with "
        f"gradient_accumulation={accumulation} has the same effective batch; mixed_precision='bf16' also helps."
    )
