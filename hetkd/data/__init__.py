"""Images from folders, datasets and tensors, and the seeds that make them reproducible."""

from hetkd.data.augment import Augmentation
from hetkd.data.images import image_transform
from hetkd.data.sets import ImageData, Splits, cifar100_split, load_images, load_splits

__all__ = ["Augmentation", "ImageData", "Splits", "cifar100_split", "image_transform", "load_images", "load_splits"]
