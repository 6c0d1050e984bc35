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
ABLATIONS = [
    'sfkd:loss="mse"',
    'sfkd:loss="infonce"',
    "sfkd:ds2s=None",
    'sfkd:streams="spatial"',
    'sfkd:streams="spectral"',
    "sfkd:refinement_stages=1",
    "sfkd:levels=0",
    "sfkd:levels=1",
    "sfkd:levels=2",
    "sfkd:stages=[3]",
    "sfkd:stages=[2,3]",
    "sfkd:stages=[0,1]",
    "sfkd:stage_weights=[0.025,0.075,0.225,0.675]",
    "uhkd:stages=[3]",
    "uhkd:keep=1",
    'uhkd:spectrum="amplitude"',
]
FINAL = [
    *("ce", "kd", "kd:temperature=4.0", "dkd", "dist", "fitnet", "cc", "crd", "ofa", "ofa:feature_weight=0.1", "rsd"),
    *("uhkd", "sfkd", 'sfkd:ds2s="lite"'),
]


@dataclass(frozen=True)
class Job:
    """One student to train.

    Attributes:
        pair: TEACHER:STUDENT.
        method: A name, or several with plus signs.
        options: Of the method, beside its defaults, and ``stages``.
        seed: Of the initial student and the order of the images.
        kind: ``"trial"`` (validation images), ``"final"``, ``"scarce"`` or ``"ablation"`` (test images too).
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
