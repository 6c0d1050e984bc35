"""Convolutional networks."""

from hetkd_adapters.family import DRY_RUN, FamilyAdapter, Layout

_RESNET_LAYERS = Layout(r"layer[1-4](\.\d+)?")
_NUMBERED_FEATURES = Layout(r"features\.\d+")
_ENCODER_STAGES = Layout(r"encoder\.stages\.\d+")


class CNNAdapter(FamilyAdapter):
    """ResNet, MobileNet, EfficientNet, ConvNeXt, RegNet, VGG, DenseNet, Inception and their kin."""

    family = "CNN"
    timm = frozenset(
        {
            "ByobNet",
            "ConvMixer",
            "ConvNeXt",
            "CspNet",
            "CspNext",
            "DLA",
            "DPN",
            "DenseNet",
            "EfficientNet",
            "FasterNet",
            "GhostNet",
            "HighPerfGpuNet",
            "HighResolutionNet",
            "InceptionNeXt",
            "InceptionResnetV2",
            "InceptionV3",
            "InceptionV4",
            "LCNetV2",
            "MetaNeXt",
            "MobileNetV3",
            "NASNetALarge",
            "NormFreeNet",
            "PNASNet5Large",
            "RDNet",
            "RegNet",
            "RepGhostNet",
            "RepVit",
            "ResNet",
            "ResNetV2",
            "RexNet",
            "SENet",
            "SelecSls",
            "StarNet",
            "TResNet",
            "VGG",
            "VovNet",
            "Xception",
            "XceptionAligned",
        }
    )
    torchvision = {
        "AlexNet": _NUMBERED_FEATURES,
        "ConvNeXt": _NUMBERED_FEATURES,
        "DenseNet": DRY_RUN,
        "EfficientNet": _NUMBERED_FEATURES,
        "GoogLeNet": DRY_RUN,
        "Inception3": DRY_RUN,
        "MNASNet": DRY_RUN,
        "MobileNetV2": _NUMBERED_FEATURES,
        "MobileNetV3": _NUMBERED_FEATURES,
        "RegNet": Layout(r"stem|trunk_output\.block\d+"),
        "ResNet": _RESNET_LAYERS,
        "ShuffleNetV2": DRY_RUN,
        "SqueezeNet": _NUMBERED_FEATURES,
        "VGG": _NUMBERED_FEATURES,
    }
    transformers = {
        "bit": _ENCODER_STAGES,
        "convnext": _ENCODER_STAGES,
        "convnextv2": _ENCODER_STAGES,
        "dinov3_convnext": DRY_RUN,
        "efficientnet": DRY_RUN,
        "hgnet_v2": DRY_RUN,
        "mobilenet_v1": Layout(r"layer\.\d+"),
        "mobilenet_v2": Layout(r"layer\.\d+|conv_1x1"),
        "pp_lcnet": DRY_RUN,
        "pp_lcnet_v3": DRY_RUN,
        "pp_lcnet_v4": DRY_RUN,
        "regnet": _ENCODER_STAGES,
        "resnet": _ENCODER_STAGES,
        "rt_detr_resnet": _ENCODER_STAGES,
        "textnet": DRY_RUN,
        "uvdoc_backbone": DRY_RUN,
    }
