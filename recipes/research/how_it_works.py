"""Draw what SFKD sees of a photo: the start page's picture, from real models and hetkd's own transforms.

    pip install scikit-image && python recipes/research/how_it_works.py      # writes docs/images/how-it-works.svg

DINOv2 ViT-S (teacher) and EfficientNet-Lite0 (student, not yet taught) see a photo of a cat (by Stéfan van der Walt,
CC0, from scikit-image). Drawn are three stages of each, the wavelet sub-bands and the spectrum of the middle one on the
common grid, how both spectra correlate over other photos, and the terms of the loss. Weights and photos are in the
folder that the variable HETKD_DATA names.
"""

import argparse
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageOps
from torch import Tensor

from hetkd import Distiller, load_model
from hetkd.features.grid import to_grid
from hetkd.methods.sfkd.sfkd import SFKD
from hetkd.spectral import dwt2, gaussian_window, low_frequencies, low_waves

PIXELS, STAGE, KEEP = 224, 1, 5
GRID = (8, 8)


def main() -> None:
    """Look at one photo, and at others for the statistics, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=128, help="over which correlations are taken")
    parser.add_argument("--output", type=Path, default=Path("docs/images/how-it-works.svg"))
    arguments = parser.parse_args()
    from skimage import data  # scikit-image has the photo

    torch.manual_seed(0)
    photos = torch.stack([pixels(Image.fromarray(data.chelsea())), *others(arguments.photos)])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(distiller(), photos, arguments.output)
    print(arguments.output)


def distiller() -> Distiller:
    """Return teacher and student with real weights."""
    folder = Path(os.environ["HETKD_DATA"])
    teacher = load_model(
        "vit_small_patch14_dinov2",
        pretrained=False,
        num_classes=0,
        img_size=PIXELS,
        weights=next((folder / "dinov2_vits14").glob("*.safetensors")),
    )
    student = load_model("tf_efficientnet_lite0", weights=next((folder / "efficientnet_lite0").glob("*.safetensors")))
    return Distiller(teacher, student, SFKD(kd_weight=0), stages=[0, 1, 2], input_size=PIXELS)


def pixels(photo: Image.Image) -> Tensor:
    """Return the middle of a photo, uint8 ``[3, 224, 224]``."""
    return torch.from_numpy(np.array(ImageOps.fit(photo.convert("RGB"), (PIXELS, PIXELS)))).permute(2, 0, 1)


def others(count: int) -> list[Tensor]:
    """Return photos of ImageNet's classes, in equal steps through them."""
    folder = Path(os.environ["HETKD_DATA"]) / "imagenet_samples_1000"
    with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        return [pixels(Image.open(io.BytesIO(archive.read(name)))) for name in names[:: len(names) // count][:count]]


@torch.no_grad()
def draw(distiller: Distiller, photos: Tensor, path: Path) -> None:
    """Draw both models' view of the first photo, and how their spectra are compared over all of them."""
    method, views = distiller.method, [distiller.taps[role].run(photos).maps for role in ("teacher", "student")]
    assert isinstance(method, SFKD)
    spectra = method.encode_stage(STAGE, views[0][STAGE]), method.coefficients(STAGE, views[1][STAGE])
    found = distiller(photos[1:], labels=None).terms

    matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "hetkd"})
    figure, axes = plt.subplots(3, 6, figsize=(10, 5.8))
    for row, (name, maps) in enumerate(zip(("teacher\n(ViT)", "student\n(CNN)"), views, strict=True)):
        axes[row, 0].imshow(photos[0].permute(1, 2, 0).numpy())
        axes[row, 0].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
        for column, stage in enumerate(maps, start=1):
            show(axes[row, column], stage[0].std(0), " x ".join(map(str, stage.shape[1:])))
        on_grid = to_grid(maps[STAGE], GRID)[0]
        show(axes[row, 4], sub_bands(on_grid), "Haar, 2 levels")
        spectrum = low_frequencies(on_grid - on_grid.mean((1, 2), keepdim=True), KEEP)
        show(axes[row, 5], spectrum.norm(dim=-1).mean(0), f"{KEEP} x {KEEP} frequencies")
    titles = ("photo", "stage 0", "stage 1", "stage 2", "sub-bands of\nstage 1 (DS2S)", "spectrum of\nstage 1")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=12)
    compare(axes[2], *spectra)
    lines = "\n".join(f"{name}: {value.item():.1f}" for name, value in found.items())
    axes[2, 4].text(0, 0.5, f"terms of the loss,\nbefore training\n{lines}", va="center", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def show(axis: Axes, values: Tensor, label: str, colours: str = "viridis") -> None:
    """Show a map as an image without ticks, with a line below."""
    axis.imshow(values.float().numpy(), cmap=colours)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(label, fontsize=10)


def sub_bands(x: Tensor) -> Tensor:
    """Return the sub-bands of a map ``[C, h, w]`` in their usual layout, each scaled by its largest value."""
    bands = dwt2(x, "haar", 2)
    whole = scaled(bands.low)
    for details in reversed(bands.details):
        horizontal, vertical, diagonal = (scaled(band) for band in details.unbind(1))
        whole = torch.cat([torch.cat([whole, horizontal], 1), torch.cat([vertical, diagonal], 1)], 0)
    return whole


def scaled(band: Tensor) -> Tensor:
    """Return the spread of a band ``[C, h, w]`` over its channels, at most 1."""
    spread = band.std(0)
    return spread / spread.max()


def compare(axes: Sequence[Axes], target: Tensor, student: Tensor) -> None:
    """Show the correlation of both spectra, the Gaussian window, and what GFFL makes of them."""
    target, student = ((x - x.mean(0)) / x.std(0) for x in (target, student))
    correlation = (target * student).mean(0)  # of each wave and channel
    rows, columns = low_waves(GRID, KEEP)[1].T
    window = gaussian_window(*GRID, 0.5)[GRID[0] // 2 - rows, GRID[1] // 2 - columns]
    for axis, values, label in (
        (axes[1], correlation.mean(1), "correlation of\nboth spectra"),
        (axes[2], window, "Gaussian window"),
        (axes[3], window * ((1 - correlation) ** 2).mean(1), "loss a frequency\n(GFFL)"),
    ):
        laid = torch.stack([values[(rows == r) & (columns == c)].mean() for r in range(3) for c in range(3)])
        show(axis, laid.unflatten(0, (3, 3)), label, "magma")
        axis.set(xticks=range(3), yticks=range(3))
    for axis in (axes[0], axes[4], axes[5]):
        axis.axis("off")
    axes[0].text(1, 0.5, "compared over\nmany photos", ha="right", va="center", fontsize=12)


if __name__ == "__main__":
    main()
