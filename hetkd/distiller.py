"""The distiller: the training step with training, evaluation, caching and saving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from hetkd.inspection import InspectedDistillation
from hetkd.models.weights import save_described
from hetkd.utils.checks import choice
from hetkd.utils.distributed import is_first_process

if TYPE_CHECKING:
    from hetkd.training.option_types import FitOptions
    from hetkd.training.run import FitResult


class Distiller(InspectedDistillation):
    """Distils a teacher into a student of any architecture.

    The teacher is frozen, stays in eval mode and is in no ``parameters()``, ``state_dict()`` or DDP bucket; it moves
    with the distiller between devices and keeps its own dtype.

    Args:
        teacher: ``"timm:NAME"`` (or a bare timm name), ``"hf:ORG/NAME"``, ``"torchvision:NAME"``, each with pretrained
            weights, or any ``nn.Module``. ``None`` for ``method="ce"`` only. A list of them: several teachers, each
            with its own input transform and a copy of the method. ``"cache:FOLDER"``: the records that `cache_teacher`
            wrote there, instead of the teachers themselves.
        student: The same, but strings build it without pretrained weights (`hetkd.load_model` for anything else), with
            ``num_classes`` classes, or else as many as the teacher.
        method: A name of `hetkd.list_methods`, a `hetkd.Method` object, or a list of both, which `hetkd.Combined` adds
            up.
        num_classes: Number of classes of a student given as a string.
        stages: Overrides the automatic pairing: rows of it (``[2, 3]``), student stages by name, or ``(teacher,
            student)`` pairs of names. Names are those of the plan, or paths of any modules that yield feature maps
            (``"layer4.1"``).
        teacher_weights: A factor for the terms of each of several teachers; ``None``: equal ones with sum 1.
        input_size: Pixels, a number or ``(height, width)``, for the student; or ``{"teacher": ..., "student": ...}``,
            with a list of sizes for several teachers. Each model defaults to the size it was made for; images of other
            sizes are resized for each model.
        normalized: ``(mean, std)`` that the loader normalised the images with. Otherwise images are float in [0, 1] or
            uint8. Each model gets its own normalisation.
        teacher_classes: Number of classes of the teachers, for modules whose output does not tell logits from features;
            0: their output is a feature.
        task: ``"classification"``, ``"segmentation"``, or a task object such as `hetkd.Segmentation`; ``None``: by what
            the models yield, logits ``[B, classes]`` or ``[B, classes, h, w]``.
        **method_options: Options of the method, when it is given by name.

    Attributes:
        student: The plain student module.
        teachers: The teachers, live or recorded; as a sequence, the modules that are run.
        method: The method, with its own parameters beside the student.
        plan: What is matched with what; print it.
        normalized: Whether images come normalised.

    Raises:
        ValueError: If a name or option does not exist, the models' class counts differ under a loss on logits, the
            teacher lacks a classifier that the method needs, a model refuses the input size, or a grid is too small.
            All of this before any training.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> import torch
        >>> from hetkd import Distiller, load_model
        >>> teacher = load_model("test_vit", pretrained=False, num_classes=10)
        >>> distiller = Distiller(teacher, "test_resnet", method="kd")
        >>> output = distiller(torch.rand(2, 3, 64, 64), torch.tensor([3, 7]))
        >>> sorted(output.terms)
        ['ce', 'kd']
    """

    def fit(
        self,
        train: Any,
        val: Any = None,
        *,
        epochs: int | None = None,
        output_dir: str | Path | None = None,
        resume: bool = False,
        **options: Unpack[FitOptions],
    ) -> FitResult:
        """Train the student with Hugging Face Accelerate, on the devices and processes that it finds.

        Args:
            train: A folder of class folders, a dataset of (image, label), tensors or NumPy arrays ``(images, labels)``,
                or a loader of such batches. With ``ce_weight=0`` also without labels: a folder, dataset, tensor or
                loader of images.
            val: The same, for `evaluate` after each epoch; ``None`` skips it. Without labels that teach: any images.
            epochs: Passes over the training data; needed unless there is ``max_steps``.
            output_dir: Folder for checkpoints, history and the student; ``None`` writes nothing.
            resume: Continue the run in ``output_dir`` from its newest whole checkpoint, if there is one.
            **options: Fields of `hetkd.training.TrainingOptions`: ``batch_size``, ``lr``, ``optimizer``,
                ``mixed_precision``, ``ema``, ``mixup``, ...

        Returns:
            History and best metrics. The student holds the weights of the last epoch (with ``ema``: their average);
            ``output_dir/best.safetensors`` those of the best.

        Raises:
            ValueError: If an option or the data are not valid.
            FileExistsError: If ``output_dir`` holds another run.
            hetkd.training.TrainingDiverged: If a loss term becomes NaN or Inf.
        """
        from hetkd.training.fit import fit

        result = fit(self, train, val, epochs=epochs, output_dir=output_dir, resume=resume, options=options)
        self.history = result.history
        if options.get("report") and result.output_dir is not None and is_first_process():
            path, image, label = result.output_dir / "report.html", options.get("image_key"), options.get("label_key")
            self.report(val, path, image_key=image, label_key=label)
        return result

    def cache_teacher(
        self,
        train: Any,
        path: str | Path,
        *,
        views: int = 1,
        top_k: int | None = None,
        maps: bool = False,
        min_crop: float | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        unreadable: str = "error",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Run the teacher once over ``views`` augmented views of each training image, and record its answers.

        ``fit(train, teacher_cache=path)`` then trains without running the teacher. Seed, view and image number decide
        each augmentation; epoch e uses view e modulo ``views``. Stopped and called again, it goes on. Logits then serve
        every method on logits, low frequencies ``sfkd`` and ``uhkd``, maps (``maps=True``) every method and student.

        Args:
            train: As for `fit`, but no loader.
            path: A folder; its size in bytes is printed first.
            views: Augmented views of each image.
            top_k: Logits kept an image; the other classes share the rest of the probability. ``None``: all.
            maps: Record the maps of the teacher's stages themselves, and of its last one, in half precision.
            min_crop: As for `fit`, which then takes it from the cache.
            batch_size: Images a forward of the teacher.
            num_workers: Processes that load images.
            unreadable: As for `fit`.
            seed: Seed of the augmentation.
            progress: Print how far it is.

        Raises:
            ValueError: If ``path`` holds another cache, or the method uses no teacher.
        """
        from hetkd.cache.write import write_cache
        from hetkd.data.images import as_single_images

        if not self.teachers.taps:
            raise ValueError(f"{self.method.title} uses no teacher, so there is nothing to cache.")
        self.task.refuse_options({"top_k": top_k})
        size, spec, min_crop = self.loading_size, self.student_inputs.spec, min_crop or self.task.min_crop
        kept: dict[str, Any] = {"size": size, "spec": spec, "min_crop": min_crop, "seed": seed}
        kept["skip_unreadable"] = choice("unreadable", unreadable, ["error", "skip"]) == "skip"
        dataset = self.task.make_dataset(train, what="train", train=True, **kept)
        self.move_to_accelerator()
        write_cache(
            self.teachers,
            as_single_images(dataset, "train", seed),
            Path(path),
            views=views,
            top_k=top_k,
            maps=maps,
            loading={"size": list(size), "interpolation": spec.interpolation, "min_crop": min_crop},
            batch_size=batch_size,
            num_workers=num_workers,
            report=print if progress else lambda line: None,
        )

    def save_student(self, path: str | Path) -> None:
        """Save the plain student, with its library's own keys: hetkd is not needed to load it.

        The file says what it is (architecture, input size and normalisation, class names, how it was made), so that
        `hetkd.load_student` needs nothing but its path. ``FILE.json`` beside it says the same in timm's words.

        Args:
            path: ``FILE.safetensors``; for a Hugging Face student also a directory (``save_pretrained``, with the image
                processor).
        """
        save_described(self.student, path, self.describe_student())
