"""CIFAR-100 by the protocol of the literature."""

import json
import sys

import pytest
import torch

from hetkd import Distiller


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


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["mixer_b:mobilenetv2", "convnext_t:resmlp_s12"])
def test_cifar100_compares_the_stages_of_the_literature(pair):
    import cifar100

    teacher, student = pair.split(":")
    models = cifar100.build_teacher(teacher, pretrained=False), cifar100.build_student(student)
    distiller = Distiller(*models, "at", stages=cifar100.stages_of(teacher, student))
    chosen = [(each.teacher.name, each.student.name) for each in distiller.method.pairs]
    isotropic = {"mixer_b", "deit_t", "resmlp_s12"}
    for side, name in enumerate((teacher, student)):
        if name in isotropic:
            assert [names[side] for names in chosen] == ["blocks.1", "blocks.3", "blocks.9", "blocks.11"]


@pytest.mark.slow
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
    monkeypatch.setattr(cifar100.subprocess, "call", lambda words: seen.append(words[2:]) or 0)
    monkeypatch.setattr(
        sys, "argv", ["cifar100.py", "--small", "--pair", "vit_s:mobilenetv2", "--methods", "ce", "uhkd"]
    )
    with pytest.raises(SystemExit):
        cifar100.main()
    arguments = compare.parse_arguments(seen[0])
    assert arguments.pairs == ["vit:mobilenetv2_050"]
    assert arguments.methods == ["ce", "uhkd"]
    assert arguments.dataset == "cifar100"
