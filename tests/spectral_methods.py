"""Options of SFKD and UHKD that tests go through."""

import math

from conftest import PAIRS

from hetkd import (
    Method,
    Stage,
    StagePair,
)

SFKD_OPTIONS = [
    {},
    {"ds2s": "full"},
    {"ds2s": "full", "levels": 0},
    {"ds2s": "full", "levels": 1, "wavelet": "db2"},
    {"ds2s": "spatial", "levels": 2},
    {"ds2s": "spectral", "loss": "mse"},
    {"loss": "mse"},
    {"loss": "infonce"},
    {"sigma": 0.0},
    {"sigma": math.inf, "keep": 3},
    {"stage_weights": "learnt"},
    {"stage_weights": (0.5, 2.0)},
    {"width": 8},
    {"width": 8, "reduction": "pca"},
]


UHKD_OPTIONS = [
    {},
    {"keep": 3, "expansion": 0.5},
    {"stage_weights": "learnt", "width": 8, "reduction": "pca"},
]


def bound(method: Method, pairs=PAIRS) -> Method:
    method.bind(pairs)
    return method


def same_pairs() -> list[StagePair]:
    return [StagePair(stage, stage) for stage in (Stage("a", 16, 8, 8), Stage("b", 32, 7, 7))]
