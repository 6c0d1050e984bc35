"""Training images with the records of a cache."""

from typing import Any

from hetkd.cache.records import TeacherCache
from hetkd.data.images import TransformedImages


class CachedImages(TransformedImages):
    """A training set whose samples come with the teacher's records: (image, label, record); -1 stands for no label.

    Args:
        images: The training set; epoch e uses view e modulo the number of views.
        cache: Made of these images.
    """

    def __init__(self, images: TransformedImages, cache: TeacherCache) -> None:
        super().__init__(images.dataset, images.transform, images.seed, skip_unreadable=images.skip_unreadable)
        self.cache = cache

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        image, label = sample if isinstance(sample, tuple) else (sample, -1)
        return image, label, self.cache.record(self.epoch, index, image)

    def start_epoch(self, epoch: int) -> None:
        """Use the view of this epoch; see `TransformedImages.start_epoch`."""
        super().start_epoch(epoch % self.cache.about["views"])
