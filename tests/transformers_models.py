"""Small models of transformers, by type."""

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
}


SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "image_size": 64, "window_size": 2}


HUGGING_FACE = [
    ("vit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("deit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("beit", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("dinov2", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("dinov2_with_registers", {**TOKENS, "patch_size": 16}, "ViT", [4, 4, 4, 4]),
    ("swin", SWIN, "Swin", [16, 8, 4, 2]),
    ("swinv2", SWIN, "Swin", [16, 8, 4, 2]),
    ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "CNN", [16, 8, 4, 2]),
    ("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "CNN", [16, 8, 4, 2]),
    ("mobilenet_v2", {"depth_multiplier": 0.35}, "CNN", [16, 8, 4, 2]),
]


def hugging_face(model_type: str, options: dict, head: bool = True) -> nn.Module:
    config = AutoConfig.for_model(model_type, **options)
    config.architectures = []  # transformers 5 iterates over it
    config.num_labels = 5
    return (AutoModelForImageClassification if head else AutoModel).from_config(config).eval()


class OwnCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
