"""Training with Hugging Face Accelerate: the loop, data, evaluation, checkpoints."""

from hetkd.training.callbacks import Callback, Moment
from hetkd.training.fit import fit
from hetkd.training.options import TrainingOptions
from hetkd.training.run import FitResult
from hetkd.training.terms import TrainingDiverged

__all__ = ["Callback", "FitResult", "Moment", "TrainingDiverged", "TrainingOptions", "fit"]
