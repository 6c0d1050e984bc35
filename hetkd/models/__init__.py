"""Models by name, their weights and their inputs."""

from hetkd.models.load import list_models, load_model
from hetkd.models.small import build_small
from hetkd.models.weights import load_weights, save_model

__all__ = ["build_small", "list_models", "load_model", "load_weights", "save_model"]
