"""The protocol of `study.py`, its pairs and methods, and the students to train."""

import ast
import json
from dataclasses import asdict, dataclass, field
from typing import Any

PROTOCOL: dict[str, Any] = {
    "images_a_class": 50,
    "validation_images_a_class": 50,
    "views": 6,
    "epochs": 20,
    "batch_size": 64,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 2,
}
CLASSES, EVALUATIONS = 100, 5
PIXELS = {"dinov2_s": 56, "lite0": 96, "swin": 32, "mixer": 32, "convnext": 64}
PIXELS |= dict.fromkeys(("resnet_slim", "deit_slim", "resmlp_slim"), 32)
TEACHERS = {"dinov2_s": "vit_small_patch14_dinov2", "lite0": "tf_efficientnet_lite0"}
TEACHERS |= {name: name for name in ("swin", "mixer", "convnext")}
PAIRS = [
    *("dinov2_s:resnet_slim", "lite0:deit_slim"),
    *("swin:resnet_slim", "mixer:resnet_slim", "convnext:resmlp_slim"),
]
HOMOGENEOUS = "lite0:resnet_slim"
FINAL = [
    *("ce", "kd", "kd:temperature=4.0", "dkd", "dist", "fitnet", "cc", "crd", "ofa", "ofa:feature_weight=0.1", "rsd"),
    *("uhkd", "sfkd"),
]
SEARCHED = [
    *("ce", "kd:kd_weight=10.0,temperature=2.0", "dkd:kd_weight=10.0", "dist:temperature=4.0"),
    "rsd:stages=[0,1,2,3],feature_weight=4.0,kd_weight=1.0,temperature=4.0",
    'fitnet:normalize="batch",feature_weight=100.0,kd_weight=10.0,temperature=4.0,stages=[0,1,2]',
    *("ofa", "crd:kd_weight=1.0,temperature=4.0", "at:feature_weight=100.0", "uhkd", "sfkd"),
]
PARTS = [
    *("sfkd", 'sfkd:ds2s="full"', 'sfkd:loss="mse"', 'sfkd:loss="infonce"', "sfkd:sigma=1e9", "sfkd:keep=1"),
    *("sfkd:stages=[0,1,2,3]", "sfkd:kd_weight=1.0", "kd:kd_weight=10.0,temperature=4.0"),
    *("uhkd", "uhkd:expansion=2.0", "uhkd:keep=1", "uhkd:stages=[0]"),
]


@dataclass(frozen=True)
class Job:
    """One student to train.

    Attributes:
        pair: TEACHER:STUDENT.
        method: A name, or several with plus signs.
        options: Of the method, beside its defaults, and ``stages``.
        seed: Of the initial student and the order of the images.
        kind: ``"trial"`` (validation images), ``"final"``, ``"scarce"`` or ``"part"`` (test images too).
        epochs: Passes over the images.
    """

    pair: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    kind: str = "trial"
    epochs: int = PROTOCOL["epochs"]

    @property
    def key(self) -> str:
        """What makes two jobs the same."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def labelled(self) -> float:
        """The share of the training images that have labels."""
        return 0.1 if self.kind == "scarce" else 1.0


def parse_method(words: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME`` or ``NAME:OPTION=VALUE,...``; values are Python's, commas within them in brackets only."""
    name, _, rest = words.partition(":")
    call = ast.parse(f"f({rest})", mode="eval").body
    assert isinstance(call, ast.Call)
    return name, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
