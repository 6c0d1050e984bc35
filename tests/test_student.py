"""A saved student is enough by itself: it builds, prepares its pictures, and names what it sees."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from timm.data import create_transform, resolve_data_config

from hetkd import Distiller, load_model, load_student
from hetkd.data.transforms import crop_transform, image_transform
from hetkd.models.inputs import input_spec

NAMES = ["ash", "birch", "cedar", "elm"]


@pytest.fixture
def picture(tmp_path):
    pixels = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels[None], (90, 120), mode="bicubic")[0].clamp(0, 1)
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(path)
    return path


def saved(tmp_path, student, **options) -> Distiller:
    distiller = Distiller(None, student, "ce", **options)
    distiller.class_names = NAMES
    distiller.save_student(tmp_path / "student.safetensors")
    return distiller


def built(name):
    torch.manual_seed(0)
    return {
        "timm": lambda: load_model("timm:test_resnet", pretrained=False, num_classes=4),
        "timm, another size": lambda: load_model("timm:test_vit", pretrained=False, num_classes=4, img_size=96),
        "timm itself": lambda: timm.create_model("test_vit", num_classes=4, img_size=64),
        "torchvision": lambda: load_model("torchvision:mobilenet_v3_small", pretrained=False, num_classes=4),
        "grey": lambda: load_model("timm:test_resnet", pretrained=False, num_classes=4, in_chans=1),
    }[name]().eval()


@pytest.mark.parametrize("name", ["timm", "timm, another size", "timm itself", "torchvision", "grey"])
def test_a_student_loads_by_its_path_alone_and_answers_as_before(tmp_path, picture, name):
    model = built(name)
    size = 64 if name in ("timm", "torchvision", "grey") else None
    distiller = saved(tmp_path, model, **({} if size is None else {"input_size": size}))
    student = load_student(tmp_path / "student.safetensors")
    assert student.classes == NAMES
    assert student.size == distiller.taps["student"].size
    images = torch.rand(3, 1 if name == "grey" else 3, *student.size)
    found = [prediction.probability for prediction in student.predict(images)]
    cropped = crop_transform(distiller.student_inputs.spec, student.size, train=False)(images).clamp(0, 1)
    expected = distiller.predict(cropped).softmax(1).max(1).values.tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    prediction = student.predict(picture, top=2)
    assert prediction.image == str(picture)
    assert [label for label, _ in prediction.top] == [prediction.label, prediction.top[1][0]]
    assert prediction.label in NAMES


def test_every_kind_of_picture_gets_the_same_answer(tmp_path, picture):
    saved(tmp_path, built("timm"), input_size=64)
    student = load_student(tmp_path / "student.safetensors")
    image = Image.open(picture)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [picture, str(picture), image, array, tensor, tensor / 255]
    for one in (student.predict(kind) for kind in kinds):
        assert one.probability == pytest.approx(student.predict(image).probability, abs=2e-3)
    assert [p.image for p in student.predict(picture.parent)] == [str(picture)]
    assert len(student.predict([picture, image])) == 2
    assert len(student.predict(torch.stack([tensor, tensor]))) == 2


@pytest.mark.parametrize("crop", [0.875, 1.0, None])
def test_timm_prepares_pictures_by_the_json_as_we_do(tmp_path, picture, crop):
    model = built("timm")
    model.input_settings = {"crop_ratio": crop, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "size": 64}
    model.input_settings["interpolation"] = "bicubic"
    distiller = saved(tmp_path, model, input_size=64)
    config = json.loads((tmp_path / "student.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == NAMES
    theirs = timm.create_model(config["architecture"], num_classes=config["num_classes"])
    timm.models.load_checkpoint(theirs, str(tmp_path / "student.safetensors"))
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"]))
    image = Image.open(picture)
    ours = image_transform(distiller.student_inputs.spec, (64, 64), train=False)(image)
    prepared = distiller.student_inputs(ours[None])[0]
    assert (transform(image) - prepared).abs().max() < 0.1  # they resize in PIL, we on tensors
    with torch.no_grad():
        logits = theirs.eval()(transform(image)[None])
    torch.testing.assert_close(logits, distiller.predict(ours[None]), atol=0.05, rtol=0.05)


def test_a_saved_teacher_teaches_by_its_path(tmp_path):
    saved(tmp_path, built("timm, another size"))
    distiller = Distiller(str(tmp_path / "student.safetensors"), tiny_cnn(num_classes=4), "kd")
    assert distiller.taps["teacher"].size == (96, 96)
    again = Distiller(tiny_vit(num_classes=4), str(tmp_path / "student.safetensors"), "kd", input_size=96)
    state = built("timm, another size").state_dict()
    assert all(torch.equal(x, state[name]) for name, x in again.student.state_dict().items())


def test_a_head_for_other_classes_takes_the_rest_of_the_file(tmp_path):
    saved(tmp_path, built("timm"), input_size=64)
    model = load_model(str(tmp_path / "student.safetensors"), num_classes=7)
    assert model.num_classes == 7
    assert torch.equal(model.conv1[0].weight, built("timm").conv1[0].weight)
    assert input_spec(model).size == (64, 64)
    assert load_student(tmp_path / "student.safetensors").classes == NAMES


@pytest.mark.parametrize("crop", [0.9, None])
def test_a_hugging_face_student_brings_its_image_processor(tmp_path, picture, crop):
    from transformers import ResNetConfig, ResNetForImageClassification, pipeline

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=4)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).eval()
    model.input_settings = {"crop_ratio": crop, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "size": 64}
    distiller = Distiller(None, model, "ce", input_size=64)
    distiller.class_names = NAMES
    distiller.save_student(tmp_path / "folder")
    answers = pipeline("image-classification", str(tmp_path / "folder"))(Image.open(picture))
    student = load_student(tmp_path / "folder")
    prediction = student.predict(picture)
    assert student.classes == NAMES
    theirs = {answer["label"]: answer["score"] for answer in answers}
    assert prediction.label in theirs
    assert theirs[prediction.label] == pytest.approx(prediction.probability, abs=0.02)
    distiller.save_student(tmp_path / "file.safetensors")
    assert load_student(tmp_path / "file.safetensors").predict(picture).probability == pytest.approx(
        prediction.probability, abs=1e-4
    )


def test_what_cannot_be_loaded_says_what_can(tmp_path):
    class Own(torch.nn.Sequential):
        pass

    own = Own(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    distiller = Distiller(None, own, "ce", input_size=32)
    distiller.save_student(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="only its own code can build"):
        load_student(tmp_path / "own.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        load_student(tmp_path / "nowhere.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"does not say which model it is .*weights="):
        load_model(str(tmp_path / "plain.safetensors"))
    with pytest.raises(ValueError, match="is a file of weights already"):
        load_model(str(tmp_path / "plain.safetensors"), weights="other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_model(str(tmp_path / "broken.safetensors"))
    (tmp_path / "empty").mkdir()
    saved(tmp_path, built("timm"), input_size=64)
    student = load_student(tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="holds no pictures"):
        student.predict(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        student.predict(tmp_path / "no.jpg")
    with pytest.raises(ValueError, match="top=0"):
        student.predict(torch.rand(3, 64, 64), top=0)


def test_a_run_says_in_its_students_how_they_were_made(tmp_path):
    data = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    distiller = Distiller(tiny_vit(num_classes=4), built("timm"), "kd", input_size=32)
    distiller.fit(data, data, epochs=1, batch_size=8, output_dir=tmp_path / "run", progress=False)
    made = json.loads((tmp_path / "run" / "best.json").read_text())["hetkd"]
    assert made["epochs"] == 1
    assert made["top1"] == pytest.approx(distiller.evaluate(data)["top1"])
    assert "KD" in made["plan"]
    assert made["method"]["kd_weight"] == 1.0
    assert made["train_images"] == 16
    assert load_student(tmp_path / "run" / "best.safetensors").size == (32, 32)


def test_a_card_says_what_the_student_is(tmp_path):
    distiller = Distiller(None, tiny_cnn(num_classes=4), "ce", input_size=32)
    distiller.class_names = NAMES
    distiller.trained = {"epochs": 3, "top1": 81.25, "top5": 100.0, "train_images": 120}
    distiller.save_student(tmp_path / "student.safetensors")
    card = (tmp_path / "student.md").read_text()
    assert card.startswith("---\ntags: [image-classification, timm, hetkd]\nlibrary_name: timm\n")
    for row in ("| classes | 4: ash, birch, cedar, elm |", "| validation top-1 / top-5, % | 81.25 / 100.00 |"):
        assert row in card
