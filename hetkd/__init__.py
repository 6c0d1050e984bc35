"""Knowledge distillation between vision models of different architectures.

from hetkd import Distiller

distiller = Distiller("hf:google/vit-base-patch16-224", "timm:resnet18", method="sfkd")
print(distiller.plan)
distiller.fit("imagenet/train", "imagenet/val", epochs=100, output_dir="runs/r18")
distiller.save_student("resnet18.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hetkd.distillation import DistillerOutput
from hetkd.distiller import Distiller
from hetkd.features import Adapter, Features, HookAdapter, Stage, StagePair, list_adapters, register_adapter
from hetkd.methods import (
    AT,
    CC,
    CE,
    CRD,
    CWD,
    DIST,
    DKD,
    KD,
    OFA,
    RKD,
    RSD,
    SFKD,
    UHKD,
    Combined,
    DeiT,
    FeatureMethod,
    FitNet,
    Method,
    PooledMethod,
    StagewiseMethod,
    list_methods,
    register_method,
)
from hetkd.models import list_models, load_model
from hetkd.tasks import Segmentation

if TYPE_CHECKING:
    from hetkd import training as training
    from hetkd.benchmarking import bench
    from hetkd.deploy import ExportReport, export
    from hetkd.finetuning import Finetuned, finetune
    from hetkd.models.int8 import simulate_int8
    from hetkd.speed import Speed
    from hetkd.student import PredictedMask, Prediction, Student, load_student

__version__ = "0.2.0"

_IMPORTED_WHEN_USED = {
    "ExportReport": "deploy",
    "Finetuned": "finetuning",
    "PredictedMask": "student",
    "Prediction": "student",
    "Speed": "speed",
    "Student": "student",
    "bench": "benchmarking",
    "export": "deploy",
    "finetune": "finetuning",
    "load_student": "student",
    "simulate_int8": "models.int8",
}
"""Public names by their module: half of what ``import hetkd`` adds to ``import torch`` is theirs."""
_MODULES = ("benchmarking", "deploy", "finetuning", "report", "runtimes", "speed", "student", "training")

__all__ = [
    "AT",
    "Adapter",
    "CC",
    "CE",
    "CRD",
    "CWD",
    "Combined",
    "DIST",
    "DKD",
    "DeiT",
    "Distiller",
    "DistillerOutput",
    "FeatureMethod",
    "ExportReport",
    "Features",
    "Finetuned",
    "FitNet",
    "HookAdapter",
    "KD",
    "Method",
    "OFA",
    "PooledMethod",
    "PredictedMask",
    "Prediction",
    "RKD",
    "RSD",
    "SFKD",
    "Segmentation",
    "Speed",
    "Stage",
    "StagePair",
    "StagewiseMethod",
    "Student",
    "UHKD",
    "bench",
    "export",
    "finetune",
    "list_adapters",
    "list_methods",
    "list_models",
    "load_model",
    "load_student",
    "register_adapter",
    "register_method",
    "simulate_int8",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_IMPORTED_WHEN_USED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_IMPORTED_WHEN_USED, *_MODULES})
