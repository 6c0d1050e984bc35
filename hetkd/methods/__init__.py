"""Distillation methods: one file each, registered by name."""

from hetkd.methods.base import Method, Targets, list_methods, make_method, register_method
from hetkd.methods.feature import FeatureMethod
from hetkd.methods.kd import CE, KD
from hetkd.methods.sfkd import SFKD
from hetkd.methods.uhkd import UHKD

__all__ = [
    "CE",
    "FeatureMethod",
    "KD",
    "Method",
    "SFKD",
    "Targets",
    "UHKD",
    "list_methods",
    "make_method",
    "register_method",
]
