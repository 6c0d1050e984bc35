"""What looks at a distillation and changes nothing: checks, accuracy, a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hetkd.data.samples import Keys
from hetkd.distillation import Distillation

if TYPE_CHECKING:
    from hetkd.training.check import DataCheck


class InspectedDistillation(Distillation):
    """The training step, and what a `hetkd.Distiller` tells of it; arguments as there."""

    def check(
        self,
        train: Any,
        val: Any = None,
        *,
        batch_size: int = 64,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> DataCheck:
        """Look at everything that `fit` would get, and print what is there and what is wrong; nothing is trained.

        It reads every image once, counts the images of each class, shows the classes of both splits beside the
        teacher's, and measures the teacher on some validation images.

        Args:
            train: As for `fit`.
            val: As for `fit`.
            batch_size: As for `fit`.
            image_key: As for `fit`.
            label_key: As for `fit`.

        Returns:
            What was printed, part by part; ``problems`` is empty if all is well.

        Example:
            >>> from hetkd import Distiller, load_model
            >>> distiller = Distiller(None, load_model("test_resnet", pretrained=False, num_classes=2), "ce")
            >>> found = distiller.check((torch.rand(6, 3, 64, 64), torch.tensor([0, 1, 0, 1, 0, 1])))
            train: 6 images, 64 x 64 pixels (median), 2 classes, 3 each
            ...
            no problem found
        """
        from hetkd.training.check import check

        self.move_to_accelerator()
        found = check(self, train, val, batch_size=batch_size, keys=Keys(image_key, label_key))
        print(found)
        return found

    def evaluate(
        self,
        data: Any,
        *,
        role: str = "student",
        batch_size: int = 128,
        num_workers: int = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        unreadable: str = "error",
    ) -> dict[str, float]:
        """Evaluate the student or a teacher where `fit` would train: on the accelerator, if there is one.

        Args:
            data: As ``val`` of `fit`. After training, class folders are those of the training data by name; before it,
                those of the model, where it knows their names.
            role: ``"student"``, ``"teacher"``, or of several teachers ``"teacher0"`` and so on.
            batch_size: Images a batch, of data that is not a loader.
            num_workers: Processes that load images.
            image_key: As for `fit`.
            label_key: As for `fit`.
            unreadable: As for `fit`; ``"skip"`` leaves such images out.

        Returns:
            ``{"top1", "top5", "loss"}``: accuracies in percent (top 5, or as many classes as there are) and mean
            cross-entropy. Where labels do not teach, ``agreement`` with the teacher in percent: the share of images of
            which both name the same class, or, where no logits are compared, the likeness of the vectors before the
            classifiers (linear CKA); then labels also yield ``knn``, the top-1 of nearest neighbours.

        Raises:
            ValueError: If the model has no classifier, the data no labels, or there is no such teacher.
        """
        from hetkd.training.evaluate import evaluate

        self.move_to_accelerator()
        loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "unreadable": unreadable}
        return evaluate(self, data, role=role, keys=Keys(image_key, label_key), **loading)

    def report(
        self,
        val: Any,
        path: str | Path = "report.html",
        *,
        baseline: Distillation | None = None,
        most_images: int = 5000,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> Path:
        """Write a page about the student: one HTML file with its pictures, without anything from the network.

        It has teacher, student and baseline side by side (accuracy, calibration, size, speed), the curves of the last
        `fit`, accuracy a class, confusions, images on which student and teacher disagree, and their features compared.

        Args:
            val: As for `fit`, with labels.
            path: Where it goes.
            baseline: The student trained alone, to compare.
            most_images: How many images are used, evenly spread.
            image_key: As for `fit`.
            label_key: As for `fit`.

        Returns:
            The path.

        Raises:
            ValueError: If there are no labels, or the student has no classifier that learns.
            ImportError: If matplotlib or jinja2 is missing: ``pip install "hetkd[report]"``.
        """
        from hetkd.report import write_report

        self.move_to_accelerator()
        keys, settings = Keys(image_key, label_key), {"method": self.method.settings(), **self.trained}
        about: dict[str, Any] = {"history": self.history, "settings": settings, "baseline": baseline}
        self.task.refuse_options({"report": True})
        return write_report(self, val, Path(path).expanduser(), keys=keys, most_images=most_images, **about)

    def move_to_accelerator(self) -> None:
        """Move to where `fit` would train; without an accelerator everything stays."""
        if torch.accelerator.is_available():
            self.to(torch.accelerator.current_accelerator())
