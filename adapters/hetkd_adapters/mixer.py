"""Networks of multi-layer perceptrons over patches."""

from hetkd_adapters.family import FamilyAdapter


class MixerAdapter(FamilyAdapter):
    """MLP-Mixer, ResMLP, gMLP and gMixer, all of timm's class MlpMixer."""

    family = "MLP-Mixer"
    timm = frozenset({"MlpMixer"})
