"""Training on Hugging Face Accelerate: set up, epochs, steps."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.data.images import TransformedImages
from hetkd.data.seeding import generators_kept, restore_random_state
from hetkd.distillation import Distillation
from hetkd.training.accelerator import gradients_enabled, make_accelerator, own_state_kept
from hetkd.training.batches import Batch
from hetkd.training.callbacks import Moment, as_callbacks
from hetkd.training.checkpoint import RunFolder
from hetkd.training.evaluate import measure_as_taught
from hetkd.training.options import TrainingOptions
from hetkd.training.progress import TrainingProgress
from hetkd.training.run import EpochPart, FitResult, Run, score
from hetkd.training.saving import Saver, run_settings
from hetkd.training.setup import set_up
from hetkd.training.sharding import share_buffers, synchronised_batchnorm, unsharded_weights
from hetkd.training.signals import end_without_traceback
from hetkd.training.terms import Terms, TrainingDiverged, refuse_broken_weights
from hetkd.training.trackers import Trackers
from hetkd.training.unused import unused_parameters
from hetkd.utils.checks import whole_number
from hetkd.utils.distributed import largest_of_processes

_CLEARLY = 3.0  # points: a teacher is measured on some images only


def fit(
    distillation: Distillation,
    train: Any,
    val: Any,
    *,
    epochs: int | None,
    output_dir: str | Path | None,
    resume: bool,
    options: Mapping[str, Any],
) -> FitResult:
    """Train; see `hetkd.Distiller.fit`."""
    # set up
    if distillation.teachers.cache is not None:
        options = {"teacher_cache": distillation.teachers.cache, **options}
    checked = TrainingOptions.from_mapping(options)
    _check_arguments(distillation, epochs, val, output_dir, resume, checked)
    folder = None if output_dir is None else RunFolder(output_dir, resume=resume, keep_last=checked.keep_last)
    distillation.look_at_values_again()
    with ExitStack() as stack:
        stack.enter_context(gradients_enabled())
        stack.enter_context(generators_kept())
        stack.enter_context(own_state_kept())
        accelerator = make_accelerator(checked, None if folder is None else folder.path)
        if folder is not None and accelerator.is_main_process:
            stack.enter_context(folder.locked())
        if accelerator.num_processes > 1:
            stack.enter_context(unused_parameters(distillation, accelerator))
        if checked.sync_batchnorm and accelerator.num_processes > 1:
            stack.enter_context(synchronised_batchnorm(distillation.student, accelerator))
        stack.callback(accelerator.unwrap_model, distillation, keep_fp32_wrapper=False)
        stack.callback(setattr, distillation.method, "class_weights", None)
        run = set_up(distillation, train, val, epochs, folder, checked, accelerator)
        stack.callback(accelerator.unwrap_model, run.model, keep_fp32_wrapper=False)
        distillation.classes_from_data = False  # it keeps those that it is trained for
        saver = Saver(run)
        if resume:
            saver.resume()
        # epochs
        train_epochs(run, saver)
        # hand the student back
        if run.ema is not None:
            distillation.student.load_state_dict(run.ema.module.state_dict())
        if accelerator.is_fsdp2:
            distillation.load_state_dict(unsharded_weights(run.model))
    return FitResult(run.state.history, run.state.best, None if folder is None else folder.path)


class Told:
    """Tells the callbacks of a run what happens; one that asks for the end ends it in all processes."""

    def __init__(self, run: Run) -> None:
        self.run, self.callbacks = run, as_callbacks(run.options.callbacks)

    def __call__(self, what: str, record: Mapping[str, Any] | None = None) -> None:
        """Call a method of all callbacks, by its name."""
        if not self.callbacks:
            return
        state = self.run.state
        epoch = state.epoch + (what in ("on_start", "on_step"))
        moment = Moment(self.run.whole, epoch, state.steps, record or {})
        for callback in self.callbacks:
            getattr(callback, what)(moment)
        state.is_stopping |= bool(largest_of_processes(int(moment.is_stopping), self.run.device))


def train_epochs(run: Run, saver: Saver) -> None:
    """Train the epochs that are left; after a divergence go back to the last checkpoint, ``returns`` times at most."""
    state, part = run.state, run.state.part
    if state.epoch + (part.step > 0) > run.epochs:
        raise ValueError(f"epochs={run.epochs}, but the run has trained more than that already.")
    saver.start()
    show = run.options.progress and run.accelerator.is_main_process
    with (
        TrainingProgress(run.epochs, run.train.count, state.epoch, part.step, enabled=show) as progress,
        saver.signals,
        Trackers(run.accelerator, run_settings(run), progress.note) as trackers,
    ):
        for note in run.notes:
            progress.note(note)
        if state.steps:
            progress.note(f"going on after epoch {state.epoch}" + (f", step {part.step}" if part.step else ""))
        tell = Told(run)
        tell("on_start")
        while not run.is_over:
            try:
                record = train_epoch(run, saver, progress, tell)
                end_epoch(run, saver, progress, trackers, record)
                tell("on_epoch", record)
            except TrainingDiverged as error:
                if run.folder is None or state.returned >= run.options.returns:
                    raise
                state.returned += 1
                returns = f"{state.returned} of {run.options.returns}"
                progress.note(f"{error} Going back to the last checkpoint ({returns}).")
                saver.restore(go_back=True)
            except (KeyboardInterrupt, SystemExit) as error:
                progress.note(_how_to_go_on(saver))
                end_without_traceback(error)
                raise
        finish(run, saver, progress, trackers)
        tell("on_end", state.history[-1] if state.history else {})
        why = _why_ended(run)
        if why:
            progress.note(why)


def finish(run: Run, saver: Saver, progress: TrainingProgress, trackers: Trackers) -> None:
    """Complete the last epoch where a run ended after its last checkpoint, or before an evaluation that was due."""
    state = run.state
    if state.part.step and state.part.count:  # resumed behind its last step
        terms = Terms(state.part, run.folder)
        means, seconds = terms.means(run.accelerator), max(state.part.seconds, 1e-9)
        speed = state.part.images * run.accelerator.num_processes / seconds
        end_epoch(run, saver, progress, trackers, _record(run, means, speed, seconds))
    elif run.val is not None and state.history and score(state.history[-1]) < 0:
        record = state.history.pop()
        state.epoch -= 1
        end_epoch(run, saver, progress, trackers, record, evaluate=True)


def _why_ended(run: Run) -> str:
    state, options = run.state, run.options
    if options.max_steps is not None and state.steps >= options.max_steps:
        more = "" if state.steps == options.max_steps else f", with the update of step {state.steps}"
        return f"ended after max_steps={options.max_steps}{more}"
    if state.is_stopping:
        return "ended by a callback"
    if state.epoch >= run.epochs:
        return ""
    return f"ended: no epoch was better than epoch {state.best['epoch']:.0f} for {options.patience} evaluations"


def _how_to_go_on(saver: Saver) -> str:
    folder = saver.run.folder
    if folder is None:
        return "stopped; nothing is on disk, for there is no output_dir"
    again = f"fit(..., output_dir={str(folder.path)!r}, resume=True)"
    if not saver.saved_step:
        return f"stopped before the first checkpoint; {again} begins anew"
    return f"saved at step {saver.saved_step}; go on with {again}"


def train_epoch(run: Run, saver: Saver, progress: TrainingProgress, tell: Told) -> dict[str, float]:
    """Train one epoch, or the rest of one that was interrupted; return its record."""
    from accelerate.utils import set_seed

    state, part, options = run.state, run.state.part, run.options
    processes = run.accelerator.num_processes
    set_seed(state.seed(options.seed, processes), device_specific=True)
    run.model.train()
    for module in run.kept_in_eval:
        module.eval()
    terms = Terms(part, run.folder)
    since = time.perf_counter() - part.seconds
    for batch in run.train.epoch(state.order, part.step):
        if part.random is not None:  # as it was after the last step before the interruption
            restore_random_state(part.random)
            part.random = None
        part.step += 1
        newest = train_step(run, batch, terms)
        part.images += len(batch.images)
        state.steps += 1
        progress.step()
        if part.step % options.log_every == 0:
            speed = part.images * processes / (time.perf_counter() - since)
            progress.show(state.epoch, terms.read(), speed)
        if part.step != run.train.count and saver.is_due():
            terms.read()
            refuse_broken_weights(run.distillation, state.epoch, run.device)
            part.seconds = time.perf_counter() - since
            saver.save_checkpoint()
            saver.signals.obey()
        tell("on_step", newest)
        if run.accelerator.sync_gradients and run.is_out_of_steps:
            break
    if part.step == 0:
        raise ValueError("train is empty: its loader yields no batch.")
    terms.read()
    refuse_broken_weights(run.distillation, state.epoch, run.device)
    seconds = time.perf_counter() - since
    return _record(run, terms.means(run.accelerator), part.images * processes / seconds, seconds)


def _record(run: Run, means: dict[str, float], speed: float, seconds: float) -> dict[str, float]:
    return {
        "epoch": float(run.state.epoch + 1),
        "lr": max(float(group["lr"]) for group in run.optimizer.param_groups),
        **{f"train/{name}": value for name, value in means.items()},
        "images_per_second": speed,
        "seconds": seconds,
    }


def train_step(run: Run, batch: Batch, terms: Terms) -> dict[str, Tensor]:
    """Forward, backward and, where gradients are not to be accumulated further, update; return the loss terms."""
    accelerator, state = run.accelerator, run.state
    images, labels = run.mixing(batch.images, batch.labels)
    with accelerator.accumulate(run.model):
        if accelerator.sync_gradients and run.scheduler is not None:
            run.scheduler.step_update(state.update)
        try:
            output = run.model(images, labels, batch.targets)
            weight = run.train.weight(state.part.step)
            accelerator.backward(output.loss if weight == 1 else weight * output.loss)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(_out_of_memory(len(images), run.options)) from error
        terms.add(state.epoch, state.part.step, output.terms, output.teacher_logits)
        if accelerator.sync_gradients:
            run.train.stretch_last_gradients(state.part.step, run.distillation)
        if accelerator.sync_gradients and run.options.clip_grad is not None:
            accelerator.clip_grad_norm_(run.distillation.parameters(), run.options.clip_grad)
        run.optimizer.step()
        run.optimizer.zero_grad()
    if accelerator.sync_gradients:
        state.update += 1
        if run.ema is not None:
            run.ema.update(run.distillation.student, step=state.update)
    return {name: term.detach() for name, term in output.terms.items()}


def end_epoch(
    run: Run,
    saver: Saver,
    progress: TrainingProgress,
    trackers: Trackers,
    record: dict[str, float],
    *,
    evaluate: bool = False,
) -> None:
    """Evaluate (if it is due, or asked for) and save a whole epoch, then log and print it."""
    state = run.state
    _report_unreadable(run, record, progress)
    student: nn.Module = run.distillation.student if run.ema is None else run.ema.module
    if run.accelerator.num_processes > 1:
        share_buffers(run.distillation)
        if run.ema is not None:
            share_buffers(run.ema.module)
    state.history.append(record)
    if run.val is not None and (evaluate or run.is_last_epoch or (state.epoch + 1) % run.options.eval_every == 0):
        try:
            record |= measure_as_taught(run.distillation, student, run.val, run.device, run.accelerator)
        except Exception:  # the epoch is trained, whatever is wrong with the validation data
            state.epoch, state.part = state.epoch + 1, EpochPart()
            saver.save_epoch(student, is_best=False)
            raise
    is_best = run.val is None or score(record) > score(state.best)
    if is_best:
        state.best, state.best_checkpoint = record, state.steps
    state.epoch, state.part = state.epoch + 1, EpochPart()
    saver.save_epoch(student, is_best)
    trackers.log(record)
    progress.epoch_done(record)
    _say_overtaken(run, record, progress)
    saver.obey_signals()


def _check_arguments(
    distillation: Distillation,
    epochs: int | None,
    val: Any,
    output_dir: str | Path | None,
    resume: bool,
    options: TrainingOptions,
) -> None:
    if epochs is None and options.max_steps is None:
        raise ValueError("fit needs to know when to end: epochs=10, or max_steps=1000.")
    whole_number("epochs", 1 if epochs is None else epochs)
    if options.report and (val is None or output_dir is None):
        raise ValueError("report=True needs an output_dir, where it goes, and val, of which it tells.")
    if options.patience is not None and val is None:
        raise ValueError(f"patience={options.patience} needs val, whose top-1 says when to end.")
    if not any(parameter.requires_grad for parameter in distillation.student.parameters()):
        raise ValueError("all parameters of the student are frozen: call student.requires_grad_(True).")
    if resume and output_dir is None:
        raise ValueError("resume=True needs the output_dir of the run to go on with.")
    if output_dir is None:
        for name in ("returns", "checkpoint_steps"):
            if getattr(options, name):
                raise ValueError(f"{name}={getattr(options, name)} needs an output_dir, where checkpoints go.")
    if epochs is not None and options.warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs={options.warmup_epochs} is more than epochs={epochs}.")


def _report_unreadable(run: Run, record: dict[str, float], progress: TrainingProgress) -> None:
    dataset = run.train.dataset
    if isinstance(dataset, TransformedImages) and dataset.transparent and not dataset.is_transparency_said:
        progress.note("some images are transparent; they are laid on white")
        dataset.is_transparency_said = True
    if not (isinstance(dataset, TransformedImages) and dataset.skip_unreadable):
        return
    unreadable = run.accelerator.reduce(dataset.unreadable.to(run.device, torch.int32))
    bad = unreadable.nonzero()[:, 0].tolist()
    record["unreadable_images"] = float(len(bad))
    if bad:
        some = ", ".join(dataset.name_of(index) for index in bad[:5]) + (", ..." if len(bad) > 5 else "")
        progress.note(f"{len(bad)} images cannot be read and were skipped: {some}")


def _say_overtaken(run: Run, record: dict[str, float], progress: TrainingProgress) -> None:
    """Say once for each teacher when the student has become better."""
    for role, top1 in list(run.teachers_top1.items()) if run.val is not None else []:
        if record.get("top1", 0.0) > top1 + _CLEARLY:
            del run.teachers_top1[role]
            progress.note(
                f"the student has overtaken the {role}, which is right on {top1:.1f} %: a better teacher helps more "
                "(hetkd.finetune), or a smaller kd_weight"
            )


def _out_of_memory(batch: int, options: TrainingOptions) -> str:
    accumulation = 2 * options.gradient_accumulation
    return (
        f"a batch of {batch} images does not fit in memory: batch_size={max(1, batch // 2)} with "
        f"gradient_accumulation={accumulation} has the same effective batch; mixed_precision='bf16' also helps."
    )
