"""Training images with the records of a cache."""

from typing import Any

from hetkd.cache.records import TeacherCache
from hetkd.data.images import TransformedImages
from hetkd.models.inputs import InputSpec


class CachedImages(TransformedImages):
    """A training set whose samples come with the teacher's records: (image, label, record); -1 stands for no label.

    Args:
        images: The training set; epoch e uses view e modulo the number of views.
        cache: Made of these images.
    """

    def __init__(self, images: TransformedImages, cache: TeacherCache) -> None:
        # Everything about the images stays where it is: this object shares their state, and adds the records.
        vars(self).update(vars(images))
        self.images, self.cache = images, cache

    def __getitem__(self, index: int) -> Any:
        self.images.label_map = self.label_map
        sample = self.images[index]
        image, label = sample if isinstance(sample, tuple) else (sample, -1)
        return image, label, self.cache.record(self.epoch, index, image)

    def for_evaluation(self, spec: InputSpec, size: tuple[int, int]) -> TransformedImages:
        """See `TransformedImages.for_evaluation`."""
        return self.images.for_evaluation(spec, size)

    def start_epoch(self, epoch: int) -> None:
        """Use the view of this epoch; see `TransformedImages.start_epoch`."""
        super().start_epoch(epoch % self.cache.about["views"])
