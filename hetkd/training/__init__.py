"""Training with Hugging Face Accelerate: the loop, data, evaluation, checkpoints."""

from hetkd.training.loop import FitResult, TrainingDiverged, fit
from hetkd.training.options import TrainingOptions

__all__ = ["FitResult", "TrainingDiverged", "TrainingOptions", "fit"]
