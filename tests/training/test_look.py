"""A look before training: what is there, what does not fit, what the teachers know."""

from itertools import pairwise

import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from training_runs import QUIET, bright_or_dark
from transformers import ViTConfig, ViTForImageClassification
from transformers_models import HUGGING_FACE

from hetkd import Distiller, load_model
from hetkd.data.folders import open_folder
from hetkd.data.images import TensorImages, TransformedImages
from hetkd.data.labels import known_labels
from hetkd.data.survey import spread, survey
from hetkd.training.look import better_order

LEVELS = {"a": 20, "b": 90, "c": 160, "d": 230}


@pytest.fixture
def folders(tmp_path):
    """Training and validation folders of brightness classes, 6 images of 40 x 30 pixels a class."""
    for split in ("train", "val"):
        for name, level in LEVELS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                Image.new("RGB", (40, 30), (level + index,) * 3).save(folder / f"{index}.png")
    return tmp_path


def break_file(path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def knows_brightness(order: str = "abcd", names: bool = False) -> torch.nn.Module:
    """A teacher that is always right, if classes are in this order."""
    config = ViTConfig(**HUGGING_FACE[0][1], num_labels=4)
    config.architectures = []
    if names:
        config.id2label = dict(enumerate(order))
    model = ViTForImageClassification(config).eval()
    levels = torch.tensor([LEVELS[name] / 255 for name in order])

    def answer(module, arguments, keywords, output):
        pixels = keywords.get("pixel_values", arguments[0] if arguments else None)
        output.logits = -100 * (pixels.mean((1, 2, 3))[:, None] * 0.5 + 0.5 - levels).abs()
        return output

    model.register_forward_hook(answer, with_kwargs=True)
    return model


def by_teacher(order: str = "abcd", names: bool = False) -> Distiller:
    return Distiller(knows_brightness(order, names), tiny_cnn(num_classes=4), "kd", input_size={"student": 32})


def test_a_survey_counts_and_measures(folders):
    dataset = TransformedImages(open_folder(folders / "train", "train"), lambda x: x)
    break_file(folders / "train" / "b" / "3.png")
    found = survey(dataset, "train", looked_at=range(len(dataset)))
    assert found.counts.tolist() == [6, 6, 6, 6]
    assert found.size == (30, 40)
    assert found.unreadable == [str(folders / "train" / "b" / "3.png")]
    assert str(found) == "train: 24 images, 40 x 30 pixels (median), 4 classes, 6 each"


@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 1000])
def test_numbers_are_evenly_spread(count):
    found = spread(count, 32)
    assert len(found) == min(count, 32)
    assert found[0] == 0
    assert found[-1] < count
    assert len({b - a for a, b in pairwise(found)}) <= 2


def test_labels_are_known_without_loading_images():
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([2, 0, 1, 1, 0, 2])
    plain = torch.utils.data.TensorDataset(images, labels)
    assert known_labels(TensorImages(images, labels)).tolist() == labels.tolist()
    assert known_labels(plain).tolist() == labels.tolist()
    assert known_labels(torch.utils.data.Subset(plain, [5, 1])).tolist() == [2, 0]
    assert known_labels(torch.utils.data.ConcatDataset([plain, plain])).tolist() == 2 * labels.tolist()
    assert known_labels(TensorImages(images, torch.rand(6, 3))) is None
    mapped = TransformedImages(plain, lambda x: x)
    mapped.label_map = [5, 6, 7]
    assert known_labels(mapped).tolist() == [7, 5, 6, 6, 5, 7]


def test_labels_of_a_column_are_known():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 3, "kind": [1, 0, 1]}
    dataset = TransformedImages(datasets.Dataset.from_dict(rows, features=features), lambda x: x)
    assert known_labels(dataset).tolist() == [1, 0, 1]


def test_check_prints_counts_classes_and_the_teacher(folders, capsys):
    found = by_teacher("dcba", names=True).check(folders / "train", folders / "val")
    out = capsys.readouterr().out
    assert found.problems == []
    assert found.teachers_top1 == {"teacher": 100.0}
    assert found.table[0] == ("d", "6", "6", "d")
    assert "train: 24 images, 40 x 30 pixels (median), 4 classes, 6 each" in out
    assert "the teacher is right on 100.0 % of 24 validation images" in out
    assert "no problem found" in out


def test_check_says_all_problems_at_once(folders, capsys):
    break_file(folders / "train" / "b" / "3.png")
    break_file(folders / "val" / "c" / "1.png")
    (folders / "val" / "e").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "val" / "e" / "0.png")
    found = by_teacher("bcda").check(folders / "train", folders / "val")
    out = capsys.readouterr().out
    assert len(found.problems) == out.count("PROBLEM: ") == 3
    assert "1 images of train cannot be read" in found.problems[0]
    assert "val has classes that train lacks: e" in found.problems[1]
    assert "another order" in found.problems[2]


def test_check_trains_nothing(folders, capsys):
    distiller = by_teacher()
    before = {name: x.clone() for name, x in distiller.state_dict().items()}
    distiller.check(folders / "train", folders / "val")
    assert all(torch.equal(x, before[name]) for name, x in distiller.state_dict().items())


def test_a_teacher_whose_classes_have_other_numbers_is_a_warning(folders):
    with pytest.warns(RuntimeWarning, match="would be on 100 % if its classes had other numbers"):
        by_teacher("bcda").fit(folders / "train", folders / "val", epochs=1, batch_size=8, **QUIET)


@pytest.mark.filterwarnings("ignore:train has images of 4 of the student's 1,000 classes")
def test_a_teacher_of_other_classes_is_refused_although_its_names_are_a_guess(folders):
    teacher = load_model("timm:test_vit", pretrained=False)  # 1000 classes, as ImageNet's
    distiller = Distiller(teacher, "timm:test_resnet", "kd", input_size={"student": 32})
    with pytest.raises(ValueError, match=r"none of the data's classes \(a, b, c, ...\) is among its 1,000"):
        distiller.fit(folders / "train", folders / "val", epochs=1, batch_size=8, **QUIET)


def test_no_better_order_is_found_in_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 20
    predicted = torch.randint(20, (400,), generator=generator)
    found = better_order(predicted, labels)
    assert found is None or found < 20


def test_evaluate_measures_the_teacher_at_its_own_size(folders):
    distiller = by_teacher("dcba", names=True)
    assert distiller.evaluate(folders / "val", role="teacher")["top1"] == 100
    assert distiller.evaluate(folders / "val")["top1"] <= 100
    with pytest.raises(ValueError, match="unknown role 'techer': did you mean 'teacher'"):
        distiller.evaluate(folders / "val", role="techer")


def test_a_student_that_overtakes_its_teacher_is_said(folders, capsys):
    teacher = tiny_vit(num_classes=4)
    torch.nn.init.zeros_(teacher.head.weight)
    distiller = Distiller(teacher, tiny_cnn(num_classes=4), "kd", input_size=32, kd_weight=0.01)
    with pytest.warns(RuntimeWarning, match="chance"):
        distiller.fit(folders / "train", folders / "val", epochs=12, batch_size=8, lr=3e-3, cpu=True)
    assert capsys.readouterr().out.count("the student has overtaken the teacher, which is right on 25.0 %") == 1


def test_unreadable_validation_images_are_left_out_and_named(folders, capsys):
    bad = folders / "val" / "c" / "1.png"
    break_file(bad)
    distiller = Distiller(None, tiny_cnn(num_classes=4), "ce", input_size=32)
    with pytest.raises(OSError, match=r"1\.png cannot be read"):
        distiller.evaluate(folders / "val")
    result = distiller.fit(folders / "train", folders / "val", epochs=1, batch_size=8, cpu=True, unreadable="skip")
    assert f"1 images of val cannot be read and are left out: {bad}" in capsys.readouterr().out
    assert result.history[0]["top1"] == pytest.approx(
        100 * round(result.history[0]["top1"] * 23 / 100) / 23  # a share of 23 images
    )
    bad.unlink()
    assert distiller.evaluate(folders / "val")["top1"] == pytest.approx(result.history[0]["top1"])


@pytest.mark.parametrize("student", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_a_student_by_name_takes_its_classes_from_the_data(folders, student):
    teacher = load_model("timm:test_vit", pretrained=False)  # of 1000 classes, which nobody asks for
    distiller = Distiller(teacher, student, "fitnet", kd_weight=0, input_size=64)
    kept = {name: x.clone() for name, x in distiller.student.state_dict().items()}
    images, labels = torch.rand(8, 3, 64, 64), torch.tensor([0, 1, 2, 4] * 2)
    assert distiller.classes == 1000
    distiller.check((images, labels))
    assert distiller.classes == 5
    changed = [name for name, x in distiller.student.state_dict().items() if x.shape != kept[name].shape]
    assert len(changed) == 2
    assert all(torch.equal(x, kept[n]) for n, x in distiller.student.state_dict().items() if n not in changed)
    distiller.fit((images, labels), epochs=1, batch_size=8, **QUIET)
    assert distiller.predict(images).shape == (8, 5)
    assert distiller.describe_student().options["num_classes"] == 5


def test_classes_that_were_asked_for_stay():
    teacher = load_model("timm:test_vit", pretrained=False)
    distiller = Distiller(teacher, "timm:test_resnet", "fitnet", kd_weight=0, input_size=64, num_classes=7)
    distiller.fit((torch.rand(8, 3, 64, 64), torch.arange(8) % 3), epochs=1, batch_size=8, **QUIET)
    assert distiller.classes == 7


def test_outputs_without_images_are_a_warning():
    distiller = Distiller(None, tiny_cnn(num_classes=1000), "ce", input_size=32)
    images, labels = bright_or_dark(24)
    with pytest.warns(RuntimeWarning, match="images of 10 of the student's 1,000 classes"):
        distiller.fit((images, labels), epochs=1, batch_size=8, **QUIET)


def test_more_classes_than_the_student_has_are_refused_at_once(folders, capsys):
    distiller = Distiller(None, tiny_cnn(num_classes=3), "ce", input_size=32)
    assert any(
        "train has 4 classes, but the student has 3" in each for each in distiller.check(folders / "train").problems
    )
    with pytest.raises(ValueError, match="classes: num_classes=4"):
        distiller.fit(folders / "train", epochs=1, batch_size=8, **QUIET)


def test_a_check_leaves_the_classes_open(folders):
    teacher = load_model("timm:test_vit", pretrained=False)
    distiller = Distiller(teacher, "timm:test_resnet", "fitnet", kd_weight=0, input_size=64)
    images = torch.rand(8, 3, 64, 64)
    distiller.check((images, torch.arange(8) % 3))
    distiller.fit((images, torch.arange(8) % 4), epochs=1, batch_size=8, **QUIET)
    assert distiller.classes == 4
