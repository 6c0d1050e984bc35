"""Convolutional networks."""

from hetkd_adapters.family import FamilyAdapter, Layout

_RESNET_LAYERS = Layout(r"layer[1-4](\.\d+)?")
_NUMBERED_FEATURES = Layout(r"features\.\d+")
_ENCODER_STAGES = Layout(r"encoder\.stages\.\d+")


class CNNAdapter(FamilyAdapter):
    """ResNet, MobileNet, EfficientNet, ConvNeXt, RegNet, VGG and their kin."""

    family = "CNN"
    timm = frozenset(
        {
            "ByobNet",
            "ConvNeXt",
            "CspNet",
            "DenseNet",
            "EfficientNet",
            "GhostNet",
            "HighResolutionNet",
            "InceptionNeXt",
            "MobileNetV3",
            "RegNet",
            "RepVit",
            "ResNet",
            "ResNetV2",
            "StarNet",
            "VGG",
            "VovNet",
        }
    )
    torchvision = {
        "ConvNeXt": _NUMBERED_FEATURES,
        "EfficientNet": _NUMBERED_FEATURES,
        "MobileNetV2": _NUMBERED_FEATURES,
        "MobileNetV3": _NUMBERED_FEATURES,
        "RegNet": Layout(r"stem|trunk_output\.block\d+"),
        "ResNet": _RESNET_LAYERS,
        "VGG": _NUMBERED_FEATURES,
    }
    transformers = {
        "convnext": _ENCODER_STAGES,
        "convnextv2": _ENCODER_STAGES,
        "mobilenet_v1": Layout(r"layer\.\d+"),
        "mobilenet_v2": Layout(r"layer\.\d+|conv_1x1"),
        "regnet": _ENCODER_STAGES,
        "resnet": _ENCODER_STAGES,
    }
