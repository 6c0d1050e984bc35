"""Every recipe in its shortest form, run as a user runs it."""

import copy
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file, save_file

from hetkd import RSD, Distiller
from hetkd.data.images import image_transform
from hetkd.models.inputs import InputSpec
from hetkd.training import TrainingDiverged
from hetkd.training.saving import Saver

RECIPES = REPOSITORY / "recipes"
sys.path.insert(0, str(RECIPES))


def run(recipe: str, *arguments: str, cwd) -> str:
    command = [sys.executable, str(RECIPES / recipe), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=cwd, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    return done.stdout


def test_quickstart(tmp_path):
    out = run(
        "quickstart.py",
        "--epochs",
        "1",
        "--method",
        "uhkd",
        "--student",
        "test_resnet",
        "--images",
        "1000",
        "--output",
        "out",
        cwd=tmp_path,
    )
    for words in (
        "method UHKD",
        "alone",
        "KD",
        "SFKD",
        "teacher",
        "loaded again in plain timm",
        "images/s",
        "gain over alone",
    ):
        assert words in out
    student = load_file(tmp_path / "out" / "student.safetensors")
    assert student["fc.weight"].shape[0] == 10
    picture = Image.open(tmp_path / "out" / "learning_curves.png")
    assert picture.size == (900, 560)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_bench_of_runs(tmp_path):
    import bench
    import bench_runs

    short = bench.parse_arguments(["tap", "--repeats", "2", "--batch-size", "4"])
    row = bench_runs.bench_tap("timm:test_resnet", torch.device("cpu"), short)
    assert row["plain_ms"] > 0
    assert 0 < row["ratio"] < 5
    assert row["memory_ratio"] >= 1
    row = bench_runs.bench_loop("kd", torch.device("cpu"), short)
    assert row["fit_images_per_second"] > 0
    assert row["ratio"] == pytest.approx(row["fit_images_per_second"] / row["step_images_per_second"])
    row = bench_runs.bench_cache("kd", torch.device("cpu"), short)
    assert row["cached_ratio"] > 0


def test_bench_of_steps(tmp_path, monkeypatch, capsys):
    import bench
    import bench_steps

    for module in (bench, bench_steps):
        monkeypatch.setattr(module, "PAIRS", {"tiny": ("test_vit", "test_resnet")})
    monkeypatch.setattr(bench_steps, "PIXELS", 160)
    methods = ["kd", "sfkd", "sfkd lite", "timm.task logits", "timm.task features", "torchdistill kd"]
    words = ["--pairs", "tiny", "--methods", *methods, "--repeats", "2", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, "--json", str(tmp_path / "rows.json")])
    bench.main()
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() >= {"floor", *methods[:-1]}, "torchdistill is optional"
    for row in rows.values():
        assert row["pair"] == "tiny"
        assert row["ratio"] > 0
        low, high = map(float, row["ratio_interval"].split(" to "))
        assert low - 5e-4 <= row["ratio"] <= high + 5e-4
        assert row["rounds"] == 2
        assert row["memory_ratio"] > 0.9
        assert row["images_per_second"] > 0
    added = {method: row["added_parameters"] for method, row in rows.items()}
    assert added["sfkd"] > added["sfkd lite"] > added["kd"] == 0
    operations = {method: row["operations"] for method, row in rows.items()}
    assert operations["sfkd"] > operations["kd"] > operations["floor"] > 100
    phases = {"input transforms", "teacher", "encode", "student", "losses", "backward", "update"}
    assert rows["sfkd"]["phases"].keys() == phases
    assert "timm.task features" in capsys.readouterr().out


def test_bench_ends_when_its_time_is_up():
    from bench_steps import LEAST_ROUNDS, measure_in_turns

    steps = {"floor": lambda: time.sleep(0.002), "slower": lambda: time.sleep(0.01)}
    seconds, ratios = measure_in_turns(steps, 1000, torch.device("cpu"), seconds=0.2)["slower"]
    assert LEAST_ROUNDS <= len(seconds) < 50
    assert min(ratios) > 1
    assert len(measure_in_turns(steps, 7, torch.device("cpu"), seconds=0.0)["floor"][0]) == LEAST_ROUNDS


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (30, 10), (40, 14)])
def test_interval_of_a_median(n, rank):
    """The ranks are those of the tables of the sign test at 95 %."""
    from timing import median_interval

    values = [float(value) for value in random.Random(0).sample(range(1, n + 1), n)]
    assert median_interval(values) == (rank, n + 1 - rank)


def test_operations_are_counted_views_aside():
    from timing import operations_of

    x = torch.ones(3, 4, requires_grad=True)
    assert operations_of(lambda: x.flatten().view(2, 6).T) == 0
    assert operations_of(lambda: (x.T @ x).relu()) == 2
    assert operations_of(lambda: x.exp().sum().backward()) > 2


def test_bench_of_parts(monkeypatch):
    import bench_parts

    monkeypatch.setattr(bench_parts, "CHANNELS", 4)
    monkeypatch.setattr(bench_parts, "SIZES", {"batch": (2, 4), "levels": (0, 1)})
    rows = bench_parts.bench_transforms(2, 2, torch.device("cpu"))
    assert [row["transform"] for row in rows][:2] == ["low_frequencies", "to_grid"]
    assert all(row["ms"] > 0 for row in rows)
    with_levels = [row for row in bench_parts.bench_growth(1, torch.device("cpu")) if row["varies"] == "levels"]
    assert {row["method"] for row in with_levels} == {"sfkd", "sfkd lite"}


@pytest.mark.parametrize("index", range(5))
def test_transforms_that_are_compared_are_equal(index):
    import bench_parts

    name, ours, _, plain = list(bench_parts.transforms(torch.device("cpu")))[index]
    x = torch.randn(2, bench_parts.CHANNELS, 16, 16)
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4, msg=name)


def test_peak_memory_counts_what_is_alive():
    from timing import peak_memory

    x, linear = torch.zeros(1000, 1000), torch.nn.Linear(1000, 1000, bias=False)

    def chain() -> None:
        first = x + 1
        second = first + 1
        del first
        _ = second + 1

    assert peak_memory(chain, torch.device("cpu"), x) == 3 * 4_000_000
    assert peak_memory(lambda: linear(x).sum(), torch.device("cpu"), x, linear) == pytest.approx(12_000_000, rel=1e-3)


def test_coverage(tmp_path):
    page = tmp_path / "coverage.md"
    run("coverage.py", "--only", "[th][of]*:*resnet18*", "--page", str(page), cwd=tmp_path)
    text = page.read_text()
    assert "1 of 1 architectures" in text
    assert "| torchvision | resnet18 | resnet18 | CNN | 64 x 64 | layer1" in text


REFUSED = {"dinat", "dinat backbone", "imagegpt", "perceiver", "shieldgemma2"}  # natten is missing; no spatial features


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_coverage_of_every_architecture():
    spec = importlib.util.spec_from_file_location("coverage_recipe", RECIPES / "coverage.py")  # "coverage" is a package
    coverage = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = coverage
    spec.loader.exec_module(coverage)
    rows = [coverage.check(candidate) for candidate in coverage.candidates("*")]
    assert {row.library for row in rows} == {"timm", "torchvision", "hf"}
    assert len(rows) >= 97 + 80 + 74
    assert {row.name: row.problems for row in rows if row.problems}.keys() <= REFUSED


def test_embedded_teacher_scores_on_the_embedded_test_images():
    import fashion
    import quickstart

    test = fashion.read_split(fashion.SUBSET, "t10k")
    teacher = fashion.build_teacher(trained=True)
    assert quickstart.evaluate_teacher(teacher, test) > 90


def test_embedded_data_is_a_balanced_subset_and_small():
    import fashion

    for split, per_class in fashion.SUBSET_SIZES.items():
        images, labels = fashion.read_split(fashion.SUBSET, split)
        assert images.shape == (10 * per_class, 1, 28, 28)
        assert torch.equal(labels.bincount(), torch.full((10,), per_class))
    sizes = {path: path.stat().st_size for path in fashion.ASSETS.rglob("*") if path.is_file()}
    teachers = [size for path, size in sizes.items() if path.parent.name == "teachers"]
    assert sum(sizes.values()) - sum(teachers) < 8e6
    assert max(teachers) < 15e6
    assert sum(teachers) < 45e6


def test_fashion_teacher(tmp_path, monkeypatch):
    """In its shortest form, with the embedded subset in the place of the whole set."""
    import fashion
    import fashion_teacher

    monkeypatch.setattr(fashion_teacher, "whole_set_folder", lambda: fashion.SUBSET)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "teacher.safetensors"
    monkeypatch.setattr(
        sys,
        "argv",
        ["fashion_teacher.py", "--epochs", "1", "--images", "128", "--output", "out", "--weights", str(weights)],
    )
    fashion_teacher.main()
    state = load_file(weights)
    assert all(value.dtype == torch.float16 for value in state.values())
    assert state.keys() == load_file(fashion.TEACHER).keys()


def test_fashion_writes_the_subset_that_it_reads(tmp_path, monkeypatch, capsys):
    import fashion

    before = fashion.read_split(fashion.SUBSET, "t10k")
    monkeypatch.setattr(fashion, "whole_set_folder", lambda source=fashion.SUBSET: source)
    monkeypatch.setattr(fashion, "SUBSET", tmp_path)
    fashion.write_subset()
    after = fashion.read_split(tmp_path, "t10k")
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert "2000 images" in capsys.readouterr().out


def tiny_data(name="tiny", classes=4, pixels=32, count=48, channels=3):
    """Images of as many brightnesses as classes."""
    from image_data import ImageData

    labels = torch.arange(count) % classes
    noise = torch.rand(count, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    images = (255 * (labels[:, None, None, None] / classes + noise / 8)).to(torch.uint8)
    return ImageData(name, (images, labels), (images[:16], labels[:16]), classes)


@pytest.mark.parametrize("name", ["vit", "swin", "mixer", "convnext", "deit", "swin_p", "resmlp", "resnet10t"])
@pytest.mark.parametrize(("pixels", "channels"), [(28, 1), (32, 3)])
def test_zoo_models_are_distilled_at_small_sizes(name, pixels, channels):
    import zoo

    model, size = zoo.build(name, pixels, 7 if channels == 3 else 10, channels)
    distiller = Distiller(
        model,
        "timm:test_resnet" if channels == 3 else copy.deepcopy(model),
        "sfkd",
        input_size={"teacher": size, "student": size if channels == 1 else 64},
    )
    assert len(distiller.method.pairs) == (3 if name.startswith("swin") else 4)
    assert distiller(torch.rand(4, channels, pixels, pixels), torch.arange(4)).loss.isfinite()


def test_train_teacher_goes_on_and_saves_in_half_precision(tmp_path):
    import train_teacher

    path = train_teacher.teacher_path(tmp_path, tiny_data(), "convnext")
    options = {"epochs": 2, "batch_size": 16, "progress": False}
    top1 = train_teacher.train_teacher("convnext", tiny_data(), path, **options)
    again = train_teacher.train_teacher("convnext", tiny_data(), path, **options)
    assert again == top1 == json.loads(path.with_suffix(".json").read_text())["top1"]
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file(path).values())


def test_train_teacher_lets_a_model_learn_from_a_saved_one(tmp_path):
    import train_teacher

    data, options = tiny_data(), {"epochs": 1, "batch_size": 16, "progress": False}
    first, second = (train_teacher.teacher_path(tmp_path, data, model) for model in ("convnext", "resnet10t"))
    train_teacher.train_teacher("convnext", data, first, **options)
    train_teacher.train_teacher("resnet10t", data, second, taught_by=first, **options)
    record = json.loads((second.with_suffix("") / "history.json").read_text())[0]
    assert {"train/ce", "train/kd", "train/uhkd.layer4"} <= set(record)
    with pytest.raises(ValueError, match=r"student\.safetensors' has no name that this script gives"):
        train_teacher.train_teacher("resnet10t", data, second, taught_by=tmp_path / "student.safetensors", **options)
    with pytest.raises(SystemExit):
        train_teacher.parse_arguments(["--taught-by", str(tmp_path / "none.safetensors")])


def test_train_teacher_starts_from_the_dinov2_weights(tmp_path, data_folder):
    import zoo

    weights = next((data_folder / "dinov2_vits14").glob("*.safetensors"))
    model, size = zoo.build("vit_small_patch14_dinov2", 28, 5, 3, pretrained=weights)
    assert size == 28
    expected = load_file(weights)["blocks.3.mlp.fc1.weight"].float()
    torch.testing.assert_close(model.blocks[3].mlp.fc1.weight.detach(), expected)
    assert model.head.out_features == 5


COMPARE = (
    "--methods",
    "ce",
    "rsd",
    "kd+at",
    "--pairs",
    "convnext:test_resnet",
    "--epochs",
    "2",
    "--seeds",
    "2",
    "--teacher-epochs",
    "1",
    "--batch-size",
    "16",
)


def compare_tiny(monkeypatch, folder, *words):
    import compare

    monkeypatch.setattr(compare, "load_images", lambda name, pixels: tiny_data(name))
    compare.main([*COMPARE, *words, "--output", str(folder)])
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_compare_writes_rows_table_and_picture_and_refuses_another_protocol(tmp_path, monkeypatch):
    rows = compare_tiny(monkeypatch, tmp_path)
    assert len(rows) == 6
    for key in (
        "dataset",
        "pair",
        "method",
        "seed",
        "top1",
        "epochs",
        "seconds",
        "peak_memory_mb",
        "added_parameters",
        "settings",
        "versions",
        "git_revision",
        "curve",
        "machine",
    ):
        assert all(key in row for row in rows)
    assert all(0 <= row["top1"] <= 100 and row["peak_memory_mb"] > 10 and len(row["curve"]) == 2 for row in rows)
    table = (tmp_path / "table.md").read_text()
    gains = [rows[index]["top1"] - rows[index - 1]["top1"] for index in (1, 4)]
    assert f"| rsd | 2 | {(rows[1]['top1'] + rows[4]['top1']) / 2:.2f} |" in table
    assert f"| {sum(gains) / 2:+.2f} |" in table
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.size[0] > 300
    before = (tmp_path / "results.jsonl").read_text()
    compare_tiny(monkeypatch, tmp_path)  # nothing is left to do
    assert (tmp_path / "results.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="batch_size 16, now 8"):
        compare_tiny(monkeypatch, tmp_path, "--batch-size", "8")
    assert len(compare_tiny(monkeypatch, tmp_path, "--seeds", "3", "--budget", "0")) == 6
    weights = next((tmp_path / "teachers").glob("*.safetensors"))
    save_file({name: x + 1 for name, x in load_file(weights).items()}, weights)
    with pytest.raises(SystemExit, match="another teacher 'convnext'"):
        compare_tiny(monkeypatch, tmp_path)


def test_compare_goes_on_after_a_method_that_diverges(tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise TrainingDiverged("the loss term 'rsd.pooled' is nan")

    monkeypatch.setattr(RSD, "compare_vectors", broken)
    rows = compare_tiny(monkeypatch, tmp_path)
    assert [row["method"] for row in rows] == ["ce", "kd+at"] * 2
    assert "`rsd`: the loss term 'rsd.pooled' is nan" in (tmp_path / "table.md").read_text()


def test_compare_killed_in_the_middle_gives_the_same_table(tmp_path, monkeypatch):
    whole = compare_tiny(monkeypatch, tmp_path / "whole")
    epochs = 0

    def power_cut(self, *arguments, real=Saver.save_epoch):
        nonlocal epochs
        epochs += 1
        real(self, *arguments)
        if epochs in (2, 5, 8):  # in the teacher's run, between two epochs of a student, after a student's last
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save_epoch", power_cut)
    cuts = 0
    while True:
        try:
            rows = compare_tiny(monkeypatch, tmp_path / "cut")
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts == 3
    for key in ("pair", "method", "seed", "top1", "curve", "added_parameters"):
        assert [row[key] for row in rows] == [row[key] for row in whole]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "vit"], "is not TEACHER:STUDENT"),
        (["--methods", "kd+rds"], "'rds' is none of"),
        (["--seeds", "0"], "must be at least 1"),
        (["--pairs", "vit:resnet_18"], "resnet18"),
        (["--methods", "all", "kd+kd"], "KD more than once"),
        (["--optimizer", "adamv"], "'adamw'"),
        (["--dataset", "fashon"], "no folder"),
    ],
)
def test_compare_refuses_bad_arguments(words, message, capsys):
    import compare

    with pytest.raises(SystemExit) as error:
        compare.main([*words, "--output", "nowhere"])
    assert message in capsys.readouterr().err + str(error.value)
    assert not os.path.exists("nowhere")


def test_image_data_of_a_folder_and_of_cifar100(tmp_path, data_folder):
    import image_data

    for split in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (50, 40), (100 * index, number, 0)).save(tmp_path / split / name / f"{number}.png")
    data = image_data.load_images(str(tmp_path), 24)
    assert data.train[0].shape == (6, 3, 24, 24)
    assert data.train[0][:, 0, 5, 5].tolist() == [0, 0, 0, 100, 100, 100]
    assert data.test[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert data.first(4).train[1].tolist() == [0, 0, 1, 1]
    assert data.first(3).train[1].tolist() == [0, 0, 1]
    cifar = image_data.load_images("cifar100")
    assert cifar.train[0].shape == (50_000, 3, 32, 32)
    assert torch.equal(cifar.test[1].bincount(), torch.full((100,), 100))
    with pytest.raises(ValueError, match="no folder"):
        image_data.load_images("imagenot")


def test_hugging_face_dataset_by_its_columns(monkeypatch):
    import types

    import image_data

    class Image_:  # what datasets calls Image and ClassLabel
        pass

    Image_.__name__ = "Image"
    label = type("ClassLabel", (), {"num_classes": 3})()

    class Split(list):
        features = {"img": Image_(), "fine_label": label}

    samples = Split({"img": Image.new("L", (30, 20), 50 * index), "fine_label": index} for index in range(3))
    module = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": samples, "test": samples})
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = image_data.load_images("hf:someone/flowers", 16)
    assert data.classes == 3
    assert data.train[0][:, 1, 8, 8].tolist() == [0, 50, 100]


def test_cifar100_protocols_and_pairs():
    import cifar100

    assert len(set(cifar100.PAIRS)) == 12
    assert {pair.split(":")[1] for pair in cifar100.PAIRS} == {
        "resnet18",
        "mobilenetv2",
        "deit_t",
        "swin_p",
        "resmlp_s12",
    }
    for name in ("swin_p", "resmlp_s12", "deit_t", "mobilenetv2"):
        student = cifar100.build_student(name)
        distiller = Distiller(None, student, "ce", normalized=(cifar100.MEAN, cifar100.STD))
        assert distiller.taps["student"].size == (224, 224)
        x = torch.randn(2, 3, 224, 224)  # the models normalise as the loader does, so nothing changes
        torch.testing.assert_close(distiller.student_inputs(x), x)


def test_cifar100_finetunes_and_distils_in_its_shortest_form(tmp_path, monkeypatch, capsys, data_folder):
    import cifar100

    monkeypatch.setitem(cifar100.TEACHERS, "swin_t", "test_vit3")  # small, and without ImageNet weights
    real = cifar100.load_model

    def without_weights(name, *, pretrained, **options):
        return real(name, pretrained=False, **options, **({"img_size": 224} if "vit" in name else {}))

    monkeypatch.setattr(cifar100, "load_model", without_weights)
    short = ["--epochs", "1", "--images", "16", "--batch-size", "8", "--workers", "0", "--output", str(tmp_path)]
    for words in (["--finetune", "swin_t"], ["--pair", "swin_t:resnet18", "--method", "kd"]):
        monkeypatch.setattr(sys, "argv", ["cifar100.py", *words, *short])
        cifar100.main()
    assert "top-1" in capsys.readouterr().out
    row = json.loads((tmp_path / "results.jsonl").read_text())
    settings = {"lr": 0.05, "processes": 1, "epochs": 1, "batch_size": 8, "effective_batch_size": 8}
    assert settings.items() <= row["settings"].items()


def test_cifar100_small_is_a_comparison_of_small_models(tmp_path, monkeypatch):
    import cifar100
    import compare

    seen = []
    monkeypatch.setattr(compare, "main", seen.append)
    monkeypatch.setattr(
        sys, "argv", ["cifar100.py", "--small", "--pair", "vit_s:mobilenetv2", "--methods", "ce", "uhkd"]
    )
    cifar100.main()
    arguments = compare.parse_arguments(seen[0])
    assert arguments.pairs == ["vit:mobilenetv2_050"]
    assert arguments.methods == ["ce", "uhkd"]
    assert arguments.dataset == "cifar100"


@pytest.mark.parametrize("classes", [2, 5])
def test_hf_to_cnn_packs_what_timm_loads(tmp_path, monkeypatch, capsys, classes):
    import hf_to_cnn
    import huggingface_hub
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=classes,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), (60 * index, 0, 0)).save(tmp_path / "photos" / split / name / f"{index}.png")
    uploads = []

    class Hub:
        def create_repo(self, *arguments, **options):
            uploads.append((arguments, options))

        def upload_folder(self, **options):
            uploads.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ["--teacher", str(tmp_path / "vit"), "--student", "test_resnet", "--dataset", str(tmp_path / "photos")]
    short = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--output", str(tmp_path / "out")]
    hub = ["--push-to-hub", "me/cnn"] if classes == 2 else []
    monkeypatch.setattr(sys, "argv", ["hf_to_cnn.py", *words, *short, *hub])
    hf_to_cnn.main()
    model = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True)
    trained = load_file(tmp_path / "out" / "run" / "last.safetensors")
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "2 classes: cat, dog" in card
    assert len(uploads) == (2 if classes == 2 else 0)
    assert ("features teach, its logits do not" in capsys.readouterr().out) == (classes == 5)


@pytest.fixture
def tiny_imagenet(tmp_path, data_folder):
    """Four classes of six crops of real ImageNet images, and weights of a small teacher for them."""
    from hetkd.models import save_model

    archive = zipfile.ZipFile(next((data_folder / "imagenet_samples_1000").glob("*.zip")))
    pictures = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))][:4]
    for label, name in enumerate(pictures):
        with Image.open(archive.open(name)) as picture:
            for split, count in (("train", 6), ("val", 3)):
                (tmp_path / "data" / split / f"n{label}").mkdir(parents=True)
                for index in range(count):
                    crop = picture.convert("RGB").crop((10 * index, 0, 10 * index + 150, 150))
                    crop.save(tmp_path / "data" / split / f"n{label}" / f"{index}.jpg")
    archive.close()
    save_model(timm.create_model("test_vit", num_classes=4), tmp_path / "teacher.safetensors")
    return tmp_path


IMAGENET = ("--teacher", "timm:test_vit", "--teacher-weights", "teacher.safetensors", "--data", "data")


def in_two_processes(script: str, *words: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(RECIPES / script), *words],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    return done.stdout


def write_shards(folder: Path, data: Path) -> None:
    """Packs the images of a folder into two WebDataset shards a split."""
    folder.mkdir()
    for split in ("train", "val"):
        files = sorted((data / split).glob("*/*.jpg"))
        for shard in range(2):
            with tarfile.open(folder / f"tiny-{split}-{shard}.tar", "w") as archive:
                for path in files[shard::2]:
                    key = f"{path.parent.name}-{path.stem}"
                    archive.add(path, f"{key}.jpg")
                    label = path.parent.name.removeprefix("n").encode()
                    member = tarfile.TarInfo(f"{key}.cls")
                    member.size = len(label)
                    archive.addfile(member, io.BytesIO(label))


def test_imagenet_from_a_stream_in_two_processes(tiny_imagenet):
    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    words = (*IMAGENET[:-1], "wds:shards", "--images", "24", "--classes", "4", "--student", "timm:test_resnet")
    short = ("--batch-size", "4", "--workers", "1", "--epochs", "1", "--output", "out")
    in_two_processes("imagenet_sfkd.py", *words, *short, cwd=tiny_imagenet)
    record = json.loads((tiny_imagenet / "out" / "history.json").read_text())[0]
    top1 = record["top1"] * 12 / 100
    assert top1 == pytest.approx(round(top1), abs=1e-3), "all 12 validation images count, once each"
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert (settings["processes"], settings["effective_batch_size"]) == (2, 8)


def test_stream_is_the_same_again_and_another_in_the_next_epoch(tiny_imagenet, monkeypatch):
    import streams

    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    spec = InputSpec(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    transform = image_transform(spec, (32, 32), train=True)

    def batches(epoch: int, rank: int = 0, images: int = 24) -> list:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = streams.open_streams(f"wds:{tiny_imagenet / 'shards'}")["train"]
        loader = streams.TrainingStream(stream, transform, batch_size=4, workers=0, images=images, seed=0)
        loader.set_epoch(epoch)
        return list(loader)

    first = batches(0)
    assert len(first) == 3
    torch.testing.assert_close(batches(0), first)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, batches(1), strict=True))
    labels = torch.cat([y for rank in (0, 1) for _, y in batches(0, rank)])
    assert labels.bincount().tolist() == [6, 6, 6, 6], "the processes share the images out"
    assert len(batches(0, images=48)) == 6, "a stream that ends early starts again"


def test_stream_without_a_whole_batch_ends(tiny_imagenet):
    import streams

    write_shards(tiny_imagenet / "shards", tiny_imagenet / "data")
    stream = streams.open_streams(f"wds:{tiny_imagenet / 'shards'}")["train"]
    transform = image_transform(InputSpec(3, (8, 8), (0.5,) * 3, (0.5,) * 3), (8, 8), train=True)
    loader = streams.TrainingStream(stream, transform, batch_size=16, workers=2, images=24, seed=0)
    with pytest.raises(SystemExit, match="no loading process has 16 images"):
        list(loader)


def test_stream_refuses_what_it_cannot_know(tmp_path, capsys):
    import imagenet_sfkd
    import streams

    with pytest.raises(SystemExit):
        imagenet_sfkd.parse_arguments(["--data", "wds:shards"])
    assert "a stream needs --images and --classes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no shards \*train\*\.tar"):
        streams.open_streams(f"wds:{tmp_path}")


def test_imagenet_in_two_processes_and_again(tiny_imagenet):
    words = (*IMAGENET, "--student", "timm:test_resnet", "--batch-size", "4", "--workers", "0", "--output", "out")
    for _ in range(2):  # the second time there is nothing left to do
        out = in_two_processes("imagenet_sfkd.py", *words, "--epochs", "2", cwd=tiny_imagenet)
    assert "going on after epoch 2" in out
    history = json.loads((tiny_imagenet / "out" / "history.json").read_text())
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert len(history) == 2
    assert settings["effective_batch_size"] == 8
    assert (settings["optimizer"], settings["lr"], settings["scheduler"]) == ("sgd", 0.1, "step")


def test_imagenet_dry_run_and_the_protocol_of_transformers(tiny_imagenet):
    words = (*IMAGENET, "--student", "timm:test_vit2", "--batch-size", "4")
    out = run("imagenet_sfkd.py", *words, "--dry-run", cwd=tiny_imagenet)
    assert "24 training images, 300 epochs" in out
    assert "effective batch 4 = 4 images x 1 processes x 1 accumulated; the learning rate 0.0005" in out
    assert "6 steps an epoch, 1,800 in all" in out
    assert "method SFKD" in out
    assert not (tiny_imagenet / "runs").exists()
    run("imagenet_sfkd.py", *words, "--epochs", "1", "--workers", "0", "--output", "out", cwd=tiny_imagenet)
    settings = json.loads((tiny_imagenet / "out" / "settings.json").read_text())
    assert (settings["optimizer"], settings["mixup"], settings["ema"]) == ("adamw", 0.8, 0.99996)
    assert "RandAugment" in settings["augment"]
