"""Distillation methods: one file each, registered by name."""

from hetkd.methods.at import AT
from hetkd.methods.cc import CC
from hetkd.methods.common.combined import Combined
from hetkd.methods.common.method import Method, Targets, list_methods, make_method, register_method
from hetkd.methods.common.stagewise import FeatureMethod, PooledMethod, StagewiseMethod
from hetkd.methods.crd import CRD
from hetkd.methods.cwd import CWD
from hetkd.methods.deit import DeiT
from hetkd.methods.dist import DIST
from hetkd.methods.dkd import DKD
from hetkd.methods.fitnet import FitNet
from hetkd.methods.kd import CE, KD
from hetkd.methods.ofa import OFA
from hetkd.methods.rkd import RKD
from hetkd.methods.rsd import RSD
from hetkd.methods.sfkd.sfkd import SFKD
from hetkd.methods.uhkd import UHKD

__all__ = [
    "AT",
    "CC",
    "CE",
    "CRD",
    "CWD",
    "Combined",
    "DIST",
    "DKD",
    "DeiT",
    "FeatureMethod",
    "FitNet",
    "KD",
    "Method",
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
