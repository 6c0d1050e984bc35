"""The training data batch by batch: loaded, checked, on the device; augmented, mixed and smoothed."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hetkd.cache.records import TeacherCache
from hetkd.data.augment import Augmentation
from hetkd.data.images import TensorImages, TransformedImages, has_labels, length
from hetkd.data.samples import images_and_labels
from hetkd.data.seeding import sample_seed
from hetkd.distillation import Distillation
from hetkd.training.options import TrainingOptions
from hetkd.training.sampling import set_epoch, with_drawn_samples
from hetkd.training.signals import quietly, with_quiet_workers


class Batch(NamedTuple):
    """Images ``[B, C, H, W]``, labels if there are any, and the teachers' targets if they are cached; on the device."""

    images: Tensor
    labels: Tensor | None
    targets: dict[str, Tensor] | None


class TargetMaker:
    """Augments and mixes a batch, and smooths its hard labels; teacher and student see the same images."""

    def __init__(self, options: TrainingOptions, classes: int | None) -> None:
        from timm.data import Mixup

        self.augment = Augmentation(options.augment) if isinstance(options.augment, str) else options.augment
        self.smoothing, self.classes = options.label_smoothing, classes or 0
        self.mix = None
        if not (options.mixup or options.cutmix or self.smoothing):
            return
        if not self.classes:
            raise ValueError("mixup, cutmix and label_smoothing need a student with a classifier.")
        if options.mixup or options.cutmix:
            self.mix = Mixup(options.mixup, options.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)

    def __call__(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the images and labels of the step for images ``[B, C, H, W]`` and labels.

        Raises:
            ValueError: If labels are soft already or the batch is odd, and images are to be mixed.
        """
        if self.augment is None and self.mix is None and not self.smoothing:
            return images, labels
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self.augment is not None:
            images = self.augment(images)
        if labels is None:
            return images, None
        if self.mix is not None:
            if labels.ndim == 2:
                raise ValueError("mixup and cutmix make soft labels from class indices, but labels are soft already.")
            if len(images) % 2:
                raise ValueError(
                    f"mixup and cutmix need an even batch, got {len(images)} images: use an even batch_size, and "
                    "drop_last=True in a loader of your own."
                )
            images, labels = self.mix(images.clone(), labels)
        elif self.smoothing:
            hard = labels if labels.ndim == 2 else F.one_hot(labels, self.classes)
            labels = hard * (1 - self.smoothing) + self.smoothing / self.classes
        return images, labels


class Batches:
    """The training batches of each epoch, from any place on.

    Args:
        loader: As the user gave it or `hetkd.data.images.make_loader` made it.
        distillation: Knows the classes, and whether labels are needed.
        mixing: Says whether labels are mixed.
        options: Of `fit`.
        accelerator: Shares a ``DataLoader`` out to the processes.
        cache: Its records come with the images, if given.

    Attributes:
        size: Images a batch.
        count: Batches an epoch, or ``None`` if the loader does not say.
        updates: Updates an epoch, or ``None``.

    Raises:
        ValueError: If labels are missing, the last batch is too small, or a schedule needs a length that is unknown.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        distillation: Distillation,
        mixing: TargetMaker,
        options: TrainingOptions,
        accelerator: Any,
        cache: TeacherCache | None,
    ) -> None:
        self.cache, self.options, self.device = cache, options, accelerator.device
        self._distillation, self._mixing = distillation, mixing
        self.has_labels = has_labels(loader)
        if self.has_labels is False:
            self._refuse_missing_labels()
        self.size: int = getattr(loader, "batch_size", None) or options.batch_size
        self._check_last_batch(loader)
        self.loader = shared_out(loader, "train", distillation, options.seed, accelerator)
        self.count = self._count(is_shared_out=isinstance(loader, DataLoader))
        self.updates = None if self.count is None else math.ceil(self.count / options.gradient_accumulation)

    @property
    def dataset(self) -> Any:
        """The data set behind the loader, if it has one."""
        return getattr(self.loader, "dataset", None)

    def epoch(self, order: int, skip: int) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            order: Sets order and augmentation (`hetkd.training.run.RunState.order`).
            skip: Batches that are done already.
        """
        last: Batch | None = None
        for batch in self._on_device(order, skip):
            if len(batch.images) == 1 and last is not None and self._distillation.method.batch_statistics:
                batch = _joined(last, batch)
            yield batch
            last = batch

    def _on_device(self, order: int, skip: int) -> Iterator[Batch]:
        for batch in quietly(self._loaded(order, skip)):
            targets = None
            if self.cache is not None:
                images, labels, records = batch
                labels = labels if self.has_labels else None
                records = {name: x.to(self.device) for name, x in records.items()}
                targets = self.cache.targets(records, self._distillation.teachers)
            else:
                images, labels = images_and_labels(batch)
            if labels is None:
                self._refuse_missing_labels()
                yield Batch(images.to(self.device, non_blocking=True), None, targets)
                continue
            if isinstance(images, Tensor) and isinstance(labels, Tensor):
                # Here the labels are still on the CPU, where looking at them costs nothing.
                self._distillation.task.check_labels(
                    labels, images, self._distillation.classes, labels.device.type == "cpu"
                )
                images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield Batch(images, labels, targets)

    def _loaded(self, order: int, skip: int) -> Iterable[Any]:
        from accelerate import skip_first_batches

        if isinstance(self.dataset, TransformedImages):
            self.dataset.start_epoch(order)
        set_epoch(self.loader, order)
        generator = getattr(self.loader, "generator", None)
        if generator is not None:  # the user's, which loading processes are seeded from
            generator.manual_seed(sample_seed(self.options.seed, order, 1) % 2**63)
        if not skip and isinstance(self.loader, DataLoader):
            return self.loader
        # Of these, what a batch holds depends on nothing before it.
        if isinstance(self.dataset, (TransformedImages, TensorImages)):
            rest: Any = skip_first_batches(self.loader, skip)
            rest.set_epoch(order)
            return rest
        return itertools.islice(self.loader, skip, self.count)

    def weight(self, step: int) -> float:
        """Return the factor of the loss of a step, from 1: more than 1 in a last, shorter window of accumulation.

        Accelerate divides each loss by ``gradient_accumulation``, however many batches the window has.
        """
        window = self.options.gradient_accumulation
        if window == 1 or self.count is None:
            return 1.0
        first = (step - 1) // window * window
        return window / min(window, self.count - first)

    def stretch_last_gradients(self, step: int, model: nn.Module) -> None:
        """Do what `weight` does, but to the gradients, at the end of a stream, which shows only when it is there."""
        window = self.options.gradient_accumulation
        batches = step % window
        # Accelerate ends a window with a loader; windows of other iterables go on in the next epoch.
        is_stream = self.count is None and isinstance(self.loader, DataLoader)
        for parameter in model.parameters() if batches and is_stream else []:
            if parameter.grad is not None:
                parameter.grad.mul_(window / batches)

    def _refuse_missing_labels(self) -> None:
        if self._distillation.method.ce_weight:
            raise ValueError("train has no labels: use ce_weight=0 to learn from the teacher alone.")
        if self._mixing.mix is not None or self._mixing.smoothing:
            raise ValueError("mixup, cutmix and label_smoothing need labels, but train has none.")

    def _check_last_batch(self, loader: Iterable[Any]) -> None:
        """Refuse, before any training, a last batch that batch statistics or mixing cannot use."""
        if not isinstance(loader, DataLoader) or not loader.batch_size:
            return
        if self._mixing.mix is not None:
            _refuse_odd_batches(loader.batch_size, length(loader.dataset))
        if loader.drop_last:
            return
        last = (length(loader.dataset) or 0) % loader.batch_size
        if last == 1 and self._distillation.method.batch_statistics:
            raise ValueError(
                "the last batch of train has one image, which has no batch statistics: use drop_last=True."
            )
        if last % 2 and self._mixing.mix is not None:
            raise ValueError(f"the last batch of train has {last} images, but mixing needs pairs: use drop_last=True.")

    def _count(self, *, is_shared_out: bool) -> int | None:
        batches, accumulation = length(self.loader), self.options.gradient_accumulation
        if batches is None:
            has_end = self.options.scheduler == "constant" or self.options.max_steps is not None
            if not has_end or self.options.warmup_epochs:
                raise ValueError(
                    "train is a loader without a length: its schedule is unknown; use max_steps=..., or "
                    "scheduler='constant', and no warmup_epochs."
                )
            return None
        if not is_shared_out:
            # Of any other iterable Accelerate does not see the end: batches that make no whole update are left out.
            batches -= batches % accumulation
            if not batches:
                raise ValueError(f"train has fewer batches than gradient_accumulation={accumulation}.")
        return batches


def _refuse_odd_batches(size: int, images: int | None) -> None:
    if images is not None and images < size:  # a single batch
        cure = f"batch_size={images - 1}" if images > 2 else "neither of both"
        if images % 2:
            raise ValueError(f"mixup and cutmix need an even batch, but train has {images} images: use {cure}.")
    elif size % 2:
        raise ValueError(
            f"mixup and cutmix need an even batch, got batch_size={size}: use batch_size={max(2, size - 1)}."
        )


def _joined(last: Batch, batch: Batch) -> Batch:
    """Return a batch of one image together with the last image before it: one image has no statistics."""
    labels = None
    if batch.labels is not None and last.labels is not None:
        labels = torch.cat([last.labels[-1:], batch.labels])
    targets = None
    if batch.targets is not None and last.targets is not None:
        targets = {name: torch.cat([last.targets[name][-1:], x]) for name, x in batch.targets.items()}
    return Batch(torch.cat([last.images[-1:], batch.images]), labels, targets)


def shared_out(loader: Iterable[Any], what: str, distillation: Distillation, seed: int, accelerator: Any) -> Any:
    """Share a ``DataLoader`` out to the processes, each image once; other iterables are each process's own.

    Raises:
        ValueError: If labels in memory are out of range, or a sampler shares the data out already.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, TensorImages) and loader.dataset.labels is not None:
        # All of them are at hand: look before any training.
        distillation.task.check_labels(loader.dataset.labels, loader.dataset.images, distillation.classes, True)
    quiet = with_quiet_workers(with_drawn_samples(loader, what, seed))
    return accelerator.prepare_data_loader(quiet, device_placement=False)
