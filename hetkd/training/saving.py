"""Saves a run and goes on with it: settings, students, and checkpoints of the whole state."""

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.data.seeding import random_state
from hetkd.methods.common.method import method_defaults
from hetkd.training.checkpoint import BEST, LAST, Checkpoint
from hetkd.training.options import LEARNING_RATES, TrainingOptions
from hetkd.training.run import EpochPart, Run, RunState
from hetkd.training.sharding import load_sharded_state, sharded_state, unsharded_weights
from hetkd.training.signals import Signals
from hetkd.training.terms import TrainingDiverged
from hetkd.utils.distributed import largest_of_processes
from hetkd.utils.files import with_prefix, without_prefix

_KEPT = ("top1", "top5", "miou", "pixel_accuracy", "knn", "agreement")  # what a student's file says of it
_DATA = ("train_images", "train_data", "teachers")  # and of the data
FREE_SETTINGS = {
    "epochs",
    "versions",
    "progress",
    "log_every",
    "num_workers",
    "cpu",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep_last",
    "keep_best",
    "returns",
    "teacher_placement",
    "compile",
    "trackers",
    "unreadable",
    "max_steps",
    "eval_every",
    "patience",
    "callbacks",
    "report",
}
"""Settings that may differ between a run and its resumption without a word."""
_OTHER_PROCESSES = {"processes", "effective_batch_size"}
"""Settings that may differ, with a note."""
_OTHERS = {"train_content": "labels, file names or pixels of train are others"}
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Saver:
    """Saves a run when it is due, and restores it.

    Attributes:
        signals: Ask for a checkpoint at once.
        saved_step: The step of the last checkpoint of this run, 0 before the first.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.signals = Signals(enabled=run.keeps_checkpoints)
        self._saved()

    def _saved(self) -> None:
        self._saved_at, self.saved_step, self._overdue = time.monotonic(), self.run.state.steps, False

    def start(self) -> None:
        """Write settings and plan, after a trial."""
        run = self.run
        if run.folder is not None and run.accelerator.is_main_process:
            if not run.accelerator.is_fsdp2:
                run.folder.try_out(run.distillation.student, run.distillation.state_dict())
            run.folder.start(run_settings(run), str(run.distillation.plan))

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one.

        Raises:
            ValueError: If the run was started with other settings, or has no checkpoints.
        """
        folder = self.run.folder
        if folder and not self.run.keeps_checkpoints and folder.load_settings():
            raise ValueError(f"resume=True, but the run in {folder.path} has no checkpoint under DeepSpeed.")
        self._refuse_other_settings()
        self.restore()

    def _refuse_other_settings(self) -> None:
        run = self.run
        before = None if run.folder is None else run.folder.load_settings()
        if run.folder is None or before is None:
            return
        now = json.loads(json.dumps(run_settings(run), default=str))
        before = {**{name: now[name] for name in run.fingerprints}, **_with_defaults(before)}  # older runs lack some
        if None in (before.get("classes"), now["classes"]):  # names that one of both could not read
            now["classes"] = before.get("classes")
        if None not in (before["val_content"], now["val_content"]) and before["val_content"] != now["val_content"]:
            run.notes.append("val has other images or labels than before; the best epoch is chosen by both")
        now["val_content"] = before["val_content"]
        changed = {
            name: _OTHERS.get(name) or f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name not in FREE_SETTINGS and before.get(name) != value
        }
        if before.get("epochs") != now["epochs"]:
            run.notes.append(f"epochs was {before.get('epochs')} and is {now['epochs']}: the schedule changes.")
        if before.get("processes") != now["processes"]:
            run.notes += [changed.pop(name) for name in _OTHER_PROCESSES & set(changed)]
        if changed:
            differences = "; ".join(changed.values())
            raise ValueError(f"resume=True, but the run in {run.folder.path} differs: {differences}.")

    def is_due(self) -> bool:
        """Say, alike in all processes, whether to write a checkpoint after this step."""
        run, options = self.run, self.run.options
        if not run.keeps_checkpoints:
            return False
        every, minutes = options.checkpoint_steps, options.checkpoint_minutes
        by_steps = every is not None and run.state.steps - self.saved_step >= every
        if by_steps or run.accelerator.num_processes == 1 or run.state.part.step % options.log_every == 0:
            self.signals.agree(run.device)
            overdue = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
            self._overdue = bool(largest_of_processes(int(overdue), run.device))
        is_due = by_steps or self._overdue or self.signals.agreed is not None
        return is_due and bool(run.accelerator.sync_gradients)  # accumulated gradients are not kept

    def save_epoch(self, student: nn.Module, is_best: bool) -> None:
        """Save students, history and a checkpoint after a whole epoch."""
        run = self.run
        kept = {name: x for name, x in run.state.history[-1].items() if name in _KEPT}
        data = {name: run.fingerprints[name] for name in _DATA if name in run.fingerprints}
        run.whole.trained = {"epochs": run.state.epoch, **kept, **data}
        if run.folder is None:
            return
        if run.accelerator.is_fsdp2:
            run.whole.load_state_dict(unsharded_weights(run.model))
            student = run.whole.student
        if run.accelerator.is_main_process:
            for name in (BEST, LAST)[not is_best :]:
                run.folder.save_student(student, name, run.whole.describe_student())
            run.folder.save_history(run.state.history)
        if run.keeps_checkpoints:
            self.save_checkpoint()

    def obey_signals(self) -> None:
        """Stop the run if a signal that came in any process asks for it, now that all is saved."""
        if self.run.folder is not None:
            self.signals.agree(self.run.device)
            self.signals.obey()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of weights, optimizer and state; all processes take part."""
        run, folder, accelerator, number = self.run, self.run.folder, self.run.accelerator, self.run.state.steps
        assert folder is not None
        weights, moments = self._weights_and_moments()
        if accelerator.is_main_process:
            folder.open_checkpoint(number)
        accelerator.wait_for_everyone()
        folder.save_random(number, accelerator.process_index, random_state())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            optimizer_tensors, optimizer_values = pack(moments)
            sums = run.state.part.sums
            tensors = {
                **with_prefix("distiller.", weights),
                **with_prefix("optimizer.", optimizer_tensors),
                **({} if run.ema is None else with_prefix("ema.", run.ema.module.state_dict())),
                **({} if sums is None else {"terms": sums}),
            }
            values = {
                **_state_values(run.state),
                "optimizer": optimizer_values,
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "settings": run_settings(run),
            }
            keep = run.state.best_checkpoint if run.options.keep_best else None
            folder.save_checkpoint(number, tensors, json.loads(json.dumps(values, default=str)), keep)
        accelerator.wait_for_everyone()
        self._saved()

    def _weights_and_moments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state dicts of distillation and optimizer; of a sharded one whole, in the first process."""
        run = self.run
        if run.accelerator.is_fsdp2:
            return sharded_state(run.model, run.optimizer.optimizer)
        return run.distillation.state_dict(), run.optimizer.state_dict()

    def restore(self, *, go_back: bool = False) -> None:
        """Restore the newest whole checkpoint, if there is one.

        Raises:
            TrainingDiverged: If there is none, and the run has to ``go_back``.
        """
        run = self.run
        saved = None if run.folder is None else run.folder.load_checkpoint()
        if saved is None:
            if go_back:
                raise TrainingDiverged("the training diverged before its first checkpoint: try a lower lr.")
            return
        weights = without_prefix("distiller.", saved.tensors)
        moments = unpack(without_prefix("optimizer.", saved.tensors), saved.values["optimizer"])
        if run.accelerator.is_fsdp2:
            load_sharded_state(run.model, run.optimizer.optimizer, weights, moments)
        else:
            run.distillation.load_state_dict(weights)
            run.optimizer.load_state_dict(moments)
            lay_out_as_parameters(run.optimizer.optimizer)
        if run.accelerator.scaler is not None and saved.values["scaler"] is not None:
            run.accelerator.scaler.load_state_dict(saved.values["scaler"])
        if run.ema is not None:
            run.ema.module.load_state_dict(without_prefix("ema.", saved.tensors))
        run.optimizer.optimizer.zero_grad()  # of steps that went wrong
        run.accelerator.step = 0
        _restore_state(run, saved)
        self.saved_step = run.state.steps


def run_settings(run: Run) -> dict[str, Any]:
    """Return everything that a run was started with, as JSON values."""
    processes = run.accelerator.num_processes
    return {
        "plan": run.distillation.plan.title,
        "method": run.distillation.method.settings(),
        "epochs": run.epochs,
        "classes": run.whole.class_names,
        "effective_batch_size": run.train.size * run.options.gradient_accumulation * processes,
        "processes": processes,
        "sharded": run.accelerator.is_fsdp2,
        **run.fingerprints,
        "versions": {name: version(name) for name in ("hetkd", "torch", "timm", "accelerate")},
        **run.options.settings(),
        "min_crop": run.whole.task.min_crop if run.options.min_crop is None else run.options.min_crop,
    }


def _state_values(state: RunState) -> dict[str, Any]:
    """Return the state as JSON values; sums and random states are saved as tensors."""
    flat = {**vars(state), **vars(state.part)}
    return {name: value for name, value in flat.items() if name not in ("part", "sums", "random", "is_stopping")}


def _restore_state(run: Run, saved: Checkpoint) -> None:
    values, state, part, processes = saved.values, run.state, EpochPart(), run.accelerator.num_processes
    returned = max(state.returned, values["returned"])
    if values["step"]:
        for name in ("step", "images", "seconds", "names", "count"):
            setattr(part, name, values[name])
        part.sums, before = saved.tensors["terms"], values["settings"]["processes"]
        if before == processes:
            part.random = saved.random.get(run.accelerator.process_index)
        else:  # the same part of the epoch, in batches of now
            part.step, part.images = part.step * before // processes, part.images * before // processes
    for name in ("epoch", "update", "steps", "history", "best", "best_checkpoint"):
        setattr(state, name, values[name])
    state.returned, state.part = returned, part


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with the defaults of options that are newer than it."""
    known = {**TrainingOptions().settings(), **settings}
    if known["lr"] is None:  # as version 0.1 wrote for the default
        known["lr"] = LEARNING_RATES.get(known["optimizer"])
    method = dict(known.get("method") or {})
    return {**known, "method": {**method_defaults(str(method.get("name"))), **method}}


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dictionaries, lists and tuples, such as an optimizer's state dict, into tensors and JSON values.

    Raises:
        TypeError: If there is a value that neither can hold.
    """
    tensors: dict[str, Tensor] = {}

    def packed(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if isinstance(value, Mapping):  # with keys that may be numbers
            return {
                "items": [[key, packed(entry, f"{path}.{key}" if path else str(key))] for key, entry in value.items()]
            }
        if isinstance(value, (list, tuple)):
            entries = [packed(entry, f"{path}.{index}") for index, entry in enumerate(value)]
            return {"tuple": entries} if isinstance(value, tuple) else entries
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path} holds {value!r}, which a checkpoint cannot: use another optimizer.")

    return tensors, packed(state, "")


def unpack(tensors: Mapping[str, Tensor], values: Any) -> Any:
    """Put together what `pack` took apart."""
    if isinstance(values, list):
        return [unpack(tensors, entry) for entry in values]
    if not isinstance(values, dict):
        return values
    ((kind, content),) = values.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return _DTYPES[content]
    entries = unpack(tensors, content)
    return tuple(entries) if kind == "tuple" else dict(entries)


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state of each parameter that parameter's memory layout, which fused kernels on CPUs need.

    A checkpoint holds contiguous tensors, but a parameter may be ``channels_last``.
    """
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == parameter.shape and x.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=x.dtype, device=x.device).copy_(x)
