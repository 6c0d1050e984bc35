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
    {"ds2s": "lite"},
    {"ds2s": None},
    {"levels": 0},
    {"levels": 1, "wavelet": "db2"},
    {"levels": 2, "streams": "spatial"},
    {"streams": "spectral", "refinement_stages": 1},
    {"refinement_stages": 0},
    {"loss": "mse"},
    {"loss": "mse", "normalize": "sample"},
    {"loss": "infonce"},
    {"loss": "infonce", "normalize": "sample"},
    {"sigma": 0.0},
    {"sigma": math.inf, "keep": 3},
    {"spectrum": "amplitude"},
    {"normalize": "sample"},
    {"normalize": "sample", "spectrum": "amplitude"},
    {"decorrelation": 0.01},
    {"stage_weights": "learnt"},
    {"stage_weights": (0.5, 2.0)},
    {"width": 8},
    {"width": 8, "reduction": "pca"},
]


UHKD_OPTIONS = [
    {},
    {"spectrum": "amplitude"},
    {"spectrum": "amplitude", "compression": "log"},
    {"compression": "power"},
    {"normalize": "sample", "keep": 3},
    {"stage_weights": "learnt", "width": 8, "reduction": "pca"},
]


def bound(method: Method, pairs=PAIRS) -> Method:
    method.bind(pairs)
    return method


def same_pairs() -> list[StagePair]:
    return [StagePair(stage, stage) for stage in (Stage("a", 16, 8, 8), Stage("b", 32, 7, 7))]
