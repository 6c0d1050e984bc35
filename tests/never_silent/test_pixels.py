"""Pixels that would come out wrong without a word."""

import errno
import io
import zlib

import numpy as np
import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image, PngImagePlugin
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from training_runs import QUIET
from transformers_models import HUGGING_FACE, hugging_face

from hetkd import Distiller
from hetkd.data.folders import ImageFiles, open_folder
from hetkd.data.images import TransformedImages
from hetkd.data.pictures import UnreadableImage, open_picture, upright_8bit


def pixel(image: Image.Image, mode: str = "L"):
    return upright_8bit(image, mode).getpixel((0, 0))


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bits_are_scaled_to_their_range(tmp_path, extension):
    values = np.array([[0, 65535], [32768, 256]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{extension}")
    image = upright_8bit(open_picture(tmp_path / f"x.{extension}"), "RGB")
    assert [image.getpixel((x, y))[0] for y in range(2) for x in range(2)] == [0, 255, 127, 0]


def test_float_images_are_taken_from_0_to_1_and_refused_beyond(tmp_path):
    assert pixel(Image.fromarray(np.full((2, 2), 0.5, np.float32))) == 127
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(np.full((8, 8), 200.0, np.float32)).save(tmp_path / str(number) / "deep.tif")
    with pytest.raises(UnreadableImage, match=r"0/deep\.tif.*reach from 200 to 200: scale them to 0 to 1"):
        Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32).fit(tmp_path, epochs=1, **QUIET)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_obeyed(tmp_path, orientation):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    turned = upright_8bit(open_picture(tmp_path / "x.png"), "RGB")
    corners = {3: (3, 1), 6: (1, 0), 8: (0, 3)}
    assert turned.getpixel(corners[orientation]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_and_said_once(tmp_path, mode, capsys):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    if mode == "P":
        image = image.quantize()
    assert upright_8bit(image.convert(mode), "RGB").getpixel((0, 0)) == (255, 255, 255)
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(2):
            image.convert(mode).save(tmp_path / name / f"{index}.png")
    Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32).fit(tmp_path, epochs=2, batch_size=2, cpu=True)
    assert capsys.readouterr().out.count("transparent") == 1


def png_with_bomb() -> bytes:
    """A PNG whose text chunk unpacks to far more than Pillow takes: a ValueError of Pillow."""
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10)))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png", pnginfo=info)
    return file.getvalue()


DAMAGED = {
    "no image": b"no image at all",
    "empty": b"",
    "truncated": None,
    "text bomb": png_with_bomb(),
    "broken header": b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
}


@pytest.fixture
def damaged(tmp_path, request):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (32, 32), (50 * index, 0, 0)).save(tmp_path / name / f"{index}.png")
    content = DAMAGED[request.param]
    path = tmp_path / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    return tmp_path


@pytest.mark.parametrize("damaged", DAMAGED, indirect=True)
def test_damaged_content_has_its_path_or_is_skipped(damaged, capsys):
    def distiller():
        return Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32)

    with pytest.raises(UnreadableImage, match=r"a/1\.png cannot be read"):
        distiller().fit(damaged, epochs=1, batch_size=8, **QUIET)
    result = distiller().fit(damaged, epochs=1, batch_size=8, unreadable="skip", **QUIET)
    assert result.history[0]["unreadable_images"] == 1


def test_a_bomb_of_pixels_is_content(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"x\.png cannot be read"):
        open_picture(tmp_path / "x.png")


@pytest.mark.parametrize("damaged", ["no image"], indirect=True)
def test_images_in_subsets_and_sums_have_a_path(damaged):
    folder = open_folder(damaged, "train")
    both = ConcatDataset([Subset(folder, [4, 5]), Subset(Subset(folder, [0, 1, 2]), [1, 2])])
    images = TransformedImages(both, lambda image: torch.zeros(3, 4, 4), seed=0)
    assert images.name_of(0).endswith("b/0.png")
    with pytest.raises(UnreadableImage, match=r"a/1\.png"):
        images[2]


def test_a_disk_that_is_gone_is_no_bad_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    images = TransformedImages(
        ImageFiles([tmp_path / "x.png", tmp_path / "gone.png"]), torch.tensor, skip_unreadable=True
    )
    with pytest.raises(FileNotFoundError):
        images[1]

    class Unmounted(ImageFiles):
        def __getitem__(self, index):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        TransformedImages(Unmounted([tmp_path / "x.png"]), torch.tensor, skip_unreadable=True)[0]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_uint8_cannot_be_normalised():
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32, normalized=IMAGENET)
    images, labels = torch.randint(255, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    for call in (lambda: distiller(images, labels), lambda: distiller.predict(images)):
        with pytest.raises(ValueError, match="uint8, which cannot be normalised"):
            call()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((2, 3, 32, 32), 200.0), "divide by 255"),
        (torch.randn(2, 3, 32, 32) * 2, "not in \\[0, 1\\]"),
        (torch.rand(2, 1, 32, 32), "1 channels, but the model takes 3"),
        (torch.rand(3, 32, 32), "add a batch axis"),
        (torch.full((2, 3, 32, 32), float("nan")), "NaN or Inf"),
    ],
)
def test_predict_looks_at_its_images(images, words):
    with pytest.raises(ValueError, match=words):
        Distiller(None, tiny_cnn(), "ce", input_size=32).predict(images)


class Quantised(nn.Module):
    """Begins with integer parameters, as quantised models do."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        assert x.is_floating_point()
        return self.head(self.body(x).mean((2, 3)))


def test_a_quantised_teacher_gets_float_images():
    distiller = Distiller(Quantised(), tiny_cnn(), "kd", input_size=32)
    assert distiller(torch.rand(2, 3, 32, 32), torch.arange(2)).teacher_logits.isfinite().all()


def test_the_plan_tells_inputs_and_where_they_come_from():
    plan = str(Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=32).plan)
    assert "teacher: 32 x 32 pixels, mean 0.500 0.500 0.500, std 0.500 0.500 0.500 (timm's configuration)" in plan
    assert "student: 32 x 32 pixels" in plan


class Around(nn.Module):
    """A module of one's own around a model of timm."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = first, tiny_vit()

    def forward(self, x):
        return self.inner(self.first(x))


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.5


@pytest.mark.parametrize(("first", "mean"), [(nn.Identity(), 0.5), (Normalize(), 0.0)])
def test_a_module_around_a_model_takes_its_settings(first, mean):
    spec = Distiller(Around(first), tiny_cnn(), "kd", input_size=32).taps["teacher"].spec
    assert spec.mean == (mean,) * 3
    assert "timm" in spec.source


def test_ones_own_module_can_be_told_its_normalisation():
    model = Quantised()
    model.input_settings = {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.9, 0.9), "size": 48}
    spec = Distiller(model, tiny_cnn(), "kd").taps["teacher"].spec
    assert (spec.mean, spec.std, spec.size) == ((0.1, 0.2, 0.3), (0.9, 0.9, 0.9), (48, 48))


def test_a_hugging_face_model_without_its_processor_is_a_warning(tmp_path):
    hugging_face("vit", HUGGING_FACE[0][1]).save_pretrained(tmp_path / "vit")
    with pytest.warns(RuntimeWarning, match="has no image processor at hand"):
        Distiller(f"hf:{tmp_path / 'vit'}", tiny_cnn(num_classes=5), "kd")


def test_pixels_that_use_little_of_their_range_are_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / name / f"{index}.png")
    student = Distiller(None, tiny_cnn(num_classes=2), "ce", input_size=32)
    assert "the brightest pixel of 8 images is 200 of 65535" in student.check(tmp_path).problems[0]
    binary = (torch.randint(2, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2)
    assert "the brightest pixel of 8 images is 1 of 255" in student.check(binary).problems[0]
