"""The wheel, installed in a fresh environment: everything that a user needs is in it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow
USED = """
import pathlib, sys, torch, hetkd
assert pathlib.Path(hetkd.__file__).is_relative_to(sys.prefix), hetkd.__file__
teacher = hetkd.load_model("timm:test_vit", pretrained=False, num_classes=4)
distiller = hetkd.Distiller(teacher, "timm:test_resnet", "sfkd", input_size={"teacher": 160, "student": 64})
data = torch.rand(16, 3, 64, 64), torch.arange(16) % 4
distiller.fit(data, data, epochs=1, batch_size=8, output_dir="run", report=True)
print(hetkd.__version__, hetkd.load_student("run/best.safetensors").predict(data[0][0]).label)
"""


def call(*command: object, folder: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that has the wheel, and sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    )
    call(*build, REPOSITORY, folder=folder)
    (wheel,) = folder.glob("hetkd-*.whl")
    call(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, folder=folder)
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_trains_from_the_wheel(python, tmp_path):
    assert call(python, "-c", USED, folder=tmp_path).splitlines()[-1].startswith("0.2.0 ")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_shell_from_the_wheel(python, tmp_path):
    assert "timm:resnet18" in call(python.with_name("hetkd"), "models", "timm:resnet18*", folder=tmp_path)


def test_adapters_are_found(python, tmp_path):
    names = call(python, "-c", "import hetkd; print(*hetkd.list_adapters())", folder=tmp_path).split()
    assert {"cnn", "vit", "swin", "mixer", "generic"} <= set(names)
