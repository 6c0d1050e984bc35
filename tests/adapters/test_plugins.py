"""Adapters of third parties: a package installed beside hetkd, two that claim one model, one that is broken."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, tiny_cnn, tiny_vit

from hetkd import HookAdapter, list_adapters, register_adapter
from hetkd.features.registry import adapters, find_adapter

SCRIPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import timm
    from hetkd import Distiller, list_adapters
    names = list_adapters()
    teacher, student = (timm.create_model(name, num_classes=10) for name in ("test_convnext", "test_resnet"))
    plan = Distiller(teacher, student, "sfkd", input_size={"teacher": 64, "student": 64}).plan
    other = Distiller(student, teacher, "sfkd", input_size={"teacher": 64, "student": 64}).plan
print(json.dumps({
    "names": names,
    "warnings": [str(warning.message) for warning in caught if "hetkd" in str(warning.message)],
    "title": plan.title,
    "stages": [row.teacher for row in plan.rows],
    "other": [row.teacher for row in other.rows],
}))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Installs the package in tests/adapters/plugin, and tells what a fresh process sees of it."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*pip, "--target", str(site), str(REPOSITORY / "tests" / "adapters" / "plugin")], check=True, cwd=site
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_installed_package_changes_how_one_architecture_is_tapped(plugin):
    assert "convnext-blocks" in plugin["names"]
    assert plugin["title"].startswith("test_convnext (ConvNeXt by blocks, 64 x 64)")
    assert all(".blocks." in stage for stage in plugin["stages"] if stage)
    assert plugin["other"][0].startswith("layer")  # the ResNet is tapped as before


@pytest.mark.slow
def test_a_broken_package_is_named_and_the_others_work(plugin):
    assert "broken" not in plugin["names"]
    assert {"cnn", "vit", "generic"} <= set(plugin["names"])
    assert len(plugin["warnings"]) == 1
    assert any("'broken' of hetkd-test-plugin does not load" in message for message in plugin["warnings"])


def test_a_plugin_that_cannot_say_what_it_accepts_is_named_and_passed_over():
    @register_adapter("test-raising")
    class Raising(HookAdapter):
        family = "raising"

        def accepts(self, model):
            raise KeyError("oops")

        def stage_names(self, model, images):
            return []

    try:
        with pytest.warns(RuntimeWarning, match="'test-raising' fails to say whether it accepts ResNet"):
            assert find_adapter(tiny_cnn()).family == "CNN"
    finally:
        adapters._items.pop("test-raising")


def test_of_two_adapters_that_accept_a_model_the_higher_priority_wins_then_the_first_name():
    def adapter(name: str, its_priority: int):
        class Claiming(HookAdapter):
            family = name
            priority = its_priority

            def accepts(self, model):
                return type(model).__name__ == "ResNet"

            def stage_names(self, model, images):
                return ["layer4"]

        return register_adapter(name)(Claiming)

    try:
        adapter("test-b", 20)
        adapter("test-a", 10)
        assert find_adapter(tiny_cnn()).family == "test-b"
        adapter("test-aa", 20)
        assert find_adapter(tiny_cnn()).family == "test-aa"
        assert find_adapter(tiny_vit()).family == "ViT"
    finally:
        for name in ("test-a", "test-aa", "test-b"):
            adapters._items.pop(name, None)
    assert not any(name.startswith("test-") for name in list_adapters())
