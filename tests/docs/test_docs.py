"""The snippets of README and docs run as printed, with small stand-ins for models and data from the network."""

import ast
import re

import pytest
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file
from transformers_models import HUGGING_FACE, hugging_face

from hetkd import list_methods
from hetkd.features.registry import adapters
from hetkd.methods.common.method import methods


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
    source = re.sub(r"\bepochs=\d+", "epochs=1", source)
    source = source.replace("batch_size=128", "batch_size=8").replace("num_workers=8", "num_workers=0")
    source = source.replace("imagenet/train", "photos/train").replace("imagenet/val", "photos/val")
    exec(compile(source, "snippet", "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*names another class than PyTorch")  # of a student of one epoch
def test_guide_of_your_photos(small_world, capsys):
    way, by_onnxruntime = snippets("docs/tutorial.md")
    assert len([line for line in way.splitlines() if line and "import" not in line]) <= 10
    small = 'hetkd.load_model("timm:test_vit", pretrained=False, num_classes=7)'
    way = way.replace('"timm:convnext_tiny"', small).replace("mobilenetv3_small_100", "test_resnet")
    run(way.replace('"photos/val")\ndistiller =', '"photos/val", epochs=0)\ndistiller ='))
    run(by_onnxruntime)
    out = capsys.readouterr().out
    assert "train: 16 images, 80 x 60 pixels (median), 2 classes, 8 each" in out
    assert out.splitlines()[-1] in ("a", "b")


GUIDES = REPOSITORY / "docs" / "guides"
LONG = {"deploy.md-0", "deploy.md-1", "report.md-0", "several-gpus.md-0"}
LONG |= {"hugging-face-teacher.md-0", "troubleshooting.md-3"}
"""Snippets of guides that take more than five seconds, or leave a process group behind."""
STAND_INS = {
    "hf:google/vit-base-patch16-224": "hf:vit",
    "photos/unlabelled": "photos/train/a",
    "photos/few": "photos/train",
    '"runs/few")': '"runs/few", epochs=1)',
}
PRINTED = {
    "own-adapter.md-0": "blocks.5",
    "own-model.md-0": "blocks.2  64 x 10 x 10  body.0.2  32 x 16 x 16",
    "without-labels.md-0": "nearest neighbours' top-1",
    "report.md-0": "report.html",
}
IN_PLAIN_TIMM = """
raw = torch.rand(2, 3, 64, 64)
spec = distiller.student_inputs.spec
mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
with torch.inference_mode():
    torch.testing.assert_close(student((raw - mean) / std), distiller.predict(raw), rtol=1e-4, atol=1e-4)
assert transform.transforms[-1].mean.tolist() == list(spec.mean) and transform.transforms[1].size == (64, 64)
"""


def guide_snippets():
    for page in sorted(GUIDES.glob("*.md")):
        for index, source in enumerate(snippets(f"docs/guides/{page.name}")):
            name = f"{page.name}-{index}"
            yield pytest.param(name, source, id=name, marks=[pytest.mark.slow] if name in LONG else [])


@pytest.mark.filterwarnings("ignore")  # of other trainers, and of students of one epoch
@pytest.mark.parametrize(("name", "source"), list(guide_snippets()))
def test_guide(name, source, small_world, capsys):
    if "import lightning" in source:
        pytest.importorskip("lightning")
    for printed, stand_in in STAND_INS.items():
        source = source.replace(printed, stand_in)
    try:
        run(source + IN_PLAIN_TIMM * ("timm.data.create_transform" in source))
    finally:
        adapters._items.pop("stripe", None)
        methods._items.pop("cosine", None)
    assert PRINTED.get(name, "") in capsys.readouterr().out
    if name.startswith("own-loop.md"):
        assert load_file("student.safetensors")["fc.weight"].shape[0] == 10


def test_troubleshooting_quotes_messages_that_exist():
    messages = []
    for path in [*(REPOSITORY / "hetkd").rglob("*.py"), *(REPOSITORY / "adapters").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                messages.append("*".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    quoted = re.findall(r"^\| `(.*?)` \|", (GUIDES / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 100
    for quote in quoted:
        parts = [part.strip() for part in quote.split("...")]
        assert any(all(part in message for part in parts) for message in messages), quote


def test_first_pages(small_world):
    (source,) = snippets("README.md")
    assert snippets("docs/index.md") == [source]
    run(source)


def test_readme_names_everything_that_exists():
    readme = (REPOSITORY / "README.md").read_text()
    index = (REPOSITORY / "docs" / "methods" / "index.md").read_text()
    assert all(f"`{name}`" in readme for name in list_methods())
    assert all(f"| [`{name}`]({name}.md) |" in index for name in list_methods())


def test_the_plan_is_shown_as_it_is(capsys, small_world):
    page = "docs/guides/own-model.md"
    run(snippets(page)[0])
    plan = capsys.readouterr().out.partition(" parameters are added")[0]
    assert plan in (REPOSITORY / page).read_text()
