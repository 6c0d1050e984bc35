"""Training with Hugging Face Accelerate: the loop, data, evaluation, checkpoints."""

from hetkd.training.loop import FitResult, fit
from hetkd.training.options import TrainingOptions
from hetkd.training.terms import TrainingDiverged

__all__ = ["FitResult", "TrainingDiverged", "TrainingOptions", "fit"]
