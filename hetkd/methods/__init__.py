"""Distillation methods: one file each, registered by name."""

from hetkd.methods.at import AT
from hetkd.methods.base import Method, Targets, list_methods, make_method, register_method
from hetkd.methods.cc import CC
from hetkd.methods.composite import Combined, MultiTeacher
from hetkd.methods.crd import CRD
from hetkd.methods.deit import DeiT
from hetkd.methods.dist import DIST
from hetkd.methods.dkd import DKD
from hetkd.methods.feature import FeatureMethod, PooledMethod, StagewiseMethod
from hetkd.methods.fitnet import FitNet
from hetkd.methods.kd import CE, KD
from hetkd.methods.ofa import OFA
from hetkd.methods.rkd import RKD
from hetkd.methods.rsd import RSD
from hetkd.methods.sfkd import SFKD
from hetkd.methods.uhkd import UHKD

__all__ = [
    "AT",
    "CC",
    "CE",
    "CRD",
    "Combined",
    "DIST",
    "DKD",
    "DeiT",
    "FeatureMethod",
    "FitNet",
    "KD",
    "Method",
    "MultiTeacher",
    "OFA",
    "PooledMethod",
    "RKD",
    "RSD",
    "SFKD",
    "StagewiseMethod",
    "Targets",
    "UHKD",
    "list_methods",
    "make_method",
    "register_method",
]
