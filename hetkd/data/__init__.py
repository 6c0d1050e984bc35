"""Images from folders, datasets and tensors, and the seeds that make them reproducible."""

from hetkd.data.augment import Augmentation
from hetkd.data.sets import ImageData, Splits, cifar100_split, load_images, load_splits
from hetkd.data.transforms import image_transform

__all__ = ["Augmentation", "ImageData", "Splits", "cifar100_split", "image_transform", "load_images", "load_splits"]
