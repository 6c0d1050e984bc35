"""The snippets of README and docs run as printed, with small stand-ins for models and data from the network."""

import ast
import dataclasses
import inspect
import re

import pytest
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file
from transformers_models import HUGGING_FACE, hugging_face

from hetkd import list_methods
from hetkd.features.registry import adapters
from hetkd.methods.common.method import methods
from hetkd.training import TrainingOptions


def snippets(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text(), flags=re.DOTALL)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A directory with a tiny Hugging Face model and tiny image folders, as the current one."""
    monkeypatch.chdir(tmp_path)
    hugging_face("vit", HUGGING_FACE[0][1]).save_pretrained("vit")
    for folder in ("imagenet", "photos"):
        for split in ("train", "val"):
            for name in ("a", "b"):
                (tmp_path / folder / split / name).mkdir(parents=True)
                for index in range(8 if folder == "photos" else 1):
                    Image.new("RGB", (80, 60), (30 * index, 0, 0)).save(
                        tmp_path / folder / split / name / f"{index}.png"
                    )
    return tmp_path


def run(source: str) -> None:
    source = source.replace("hf:google/vit-base-patch16-224", "hf:vit")
    source = re.sub(r"epochs=\d+", "epochs=1", source)
    source = source.replace("batch_size=128", "batch_size=8").replace("num_workers=8", "num_workers=0")
    source = source.replace("imagenet/train", "photos/train").replace("imagenet/val", "photos/val")
    exec(compile(source, "snippet", "exec"), {})


@pytest.mark.filterwarnings("ignore:.*names another class than PyTorch")  # of a student of one epoch
def test_guide_of_your_photos(small_world, capsys):
    way, by_onnxruntime = snippets("docs/guides/your-photos.md")
    assert len([line for line in way.splitlines() if line and "import" not in line]) <= 10
    small = 'hetkd.load_model("timm:test_vit", pretrained=False, num_classes=7)'
    way = way.replace('"timm:convnext_tiny"', small).replace("mobilenetv3_small_100", "test_resnet")
    run(way.replace('"photos/val")\ndistiller =', '"photos/val", epochs=0)\ndistiller ='))
    run(by_onnxruntime)
    out = capsys.readouterr().out
    assert "train: 16 images, 80 x 60 pixels (median), 2 classes, 8 each" in out
    assert out.splitlines()[-1] in ("a", "b")


def test_guide_without_labels(small_world, capsys):
    (source,) = snippets("docs/guides/without-labels.md")
    source = source.replace('"runs/few")', '"runs/few", epochs=1)')
    run(source.replace("photos/unlabelled", "photos/train/a").replace("photos/few", "photos/train"))
    assert "nearest neighbours' top-1" in capsys.readouterr().out


def test_readme_has_snippets():
    assert len(snippets("README.md")) >= 3


@pytest.mark.parametrize("index", list(range(len(snippets("README.md")))))
def test_readme(index, small_world):
    run(snippets("README.md")[index])


@pytest.mark.parametrize("index", list(range(len(snippets("adapters/README.md")))))
def test_adapters_readme(index, small_world, capsys):
    try:
        run(snippets("adapters/README.md")[index])
        assert "blocks.5" in capsys.readouterr().out
    finally:
        adapters._items.pop("stripe", None)


@pytest.mark.parametrize("index", list(range(len(snippets("docs/methods/README.md")))))
def test_methods_page(index, small_world):
    try:
        run(snippets("docs/methods/README.md")[index])
    finally:
        methods._items.pop("cosine", None)


@pytest.mark.filterwarnings("ignore")  # of the other trainers
@pytest.mark.parametrize("index", list(range(len(snippets("docs/other-trainers.md")))))
def test_other_trainers(index, small_world):
    source = snippets("docs/other-trainers.md")[index]
    if "import lightning" in source:
        pytest.importorskip("lightning")
    run(source)
    assert load_file("student.safetensors")["fc.weight"].shape[0] == 10


@pytest.mark.slow
@pytest.mark.parametrize("index", list(range(len(snippets("docs/many-processes.md")))))
def test_many_processes(index, small_world):
    run(snippets("docs/many-processes.md")[index])


def test_training_page(small_world):
    callbacks, source = snippets("docs/training.md")
    run(callbacks)
    run(f"{source}\nraw = torch.rand(2, 3, 64, 64)\nspec = distiller.student_inputs.spec\n" + IN_PLAIN_TIMM)


IN_PLAIN_TIMM = """
mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
with torch.inference_mode():
    torch.testing.assert_close(student((raw - mean) / std), distiller.predict(raw), rtol=1e-4, atol=1e-4)
assert transform.transforms[-1].mean.tolist() == list(spec.mean) and transform.transforms[1].size == (64, 64)
"""


def test_training_page_has_all_options_and_defaults():
    page = (REPOSITORY / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, flags=re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in rows} == {
        field.name: field.default for field in dataclasses.fields(TrainingOptions)
    }


def test_readme_names_everything_that_exists():
    readme = (REPOSITORY / "README.md").read_text()
    index = (REPOSITORY / "docs" / "methods" / "README.md").read_text()
    assert all(f"| [`{name}`](docs/methods/{name}.md) |" in readme for name in list_methods())
    assert all(f"| [`{name}`]({name}.md) |" in index for name in list_methods())


@pytest.mark.parametrize("name", list_methods())
def test_page_of_a_method_has_its_options_and_defaults(name):
    page = (REPOSITORY / "docs" / "methods" / f"{name}.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, flags=re.MULTILINE)
    options = inspect.signature(methods[name]).parameters
    assert [row[0] for row in rows] == list(options)
    for option, default in rows:
        assert ast.literal_eval(default) == options[option].default
    assert "arxiv.org/abs" in page or name == "ce"
    assert all(f"## {heading}" in page for heading in ("Idea", "Formula", "Options", "Cost", "When to use it"))


def test_readme_shows_the_plan_as_it_is():
    from hetkd import Distiller, load_model

    teacher = load_model("vit_tiny_patch16_224", pretrained=False)
    assert str(Distiller(teacher, "resnet18", "sfkd").plan) in (REPOSITORY / "README.md").read_text()
