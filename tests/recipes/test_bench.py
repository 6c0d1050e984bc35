"""Benchmarks: they run, and count what they say."""

import json
import random
import sys
import time

import pytest
import torch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:train has images of")  # the shortest form has a few images
def test_bench_of_runs(tmp_path):
    import bench
    import runs

    short = bench.parse_arguments(["tap", "--repeats", "2", "--batch-size", "4"])
    row = runs.bench_tap("timm:test_resnet", torch.device("cpu"), short)
    assert row["plain_ms"] > 0
    assert 0 < row["ratio"] < 5
    assert row["memory_ratio"] >= 1
    row = runs.bench_loop("kd", torch.device("cpu"), short)
    assert row["fit_images_per_second"] > 0
    assert row["ratio"] == pytest.approx(row["fit_images_per_second"] / row["step_images_per_second"])
    row = runs.bench_cache("kd", torch.device("cpu"), short)
    assert row["cached_ratio"] > 0


@pytest.mark.slow
def test_bench_of_steps(tmp_path, monkeypatch, capsys):
    import bench
    import steps

    for module in (bench, steps):
        monkeypatch.setattr(module, "PAIRS", {"tiny": ("test_vit", "test_resnet")})
    monkeypatch.setattr(steps, "PIXELS", 160)
    methods = ["kd", "sfkd", "sfkd ds2s", "timm.task logits", "timm.task features", "torchdistill kd"]
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
    assert added["sfkd ds2s"] > added["sfkd"] > added["kd"] == 0
    operations = {method: row["operations"] for method, row in rows.items()}
    assert operations["sfkd"] > operations["kd"] > operations["floor"] > 100
    phases = {"input transforms", "teacher", "encode", "student", "losses", "backward", "update"}
    assert rows["sfkd"]["phases"].keys() == phases
    assert "timm.task features" in capsys.readouterr().out


def test_bench_ends_when_its_time_is_up():
    from steps import LEAST_ROUNDS, measure_in_turns

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
    import parts

    monkeypatch.setattr(parts, "CHANNELS", 4)
    monkeypatch.setattr(parts, "SIZES", {"batch": (2, 4), "levels": (0, 1)})
    rows = parts.bench_transforms(2, 2, torch.device("cpu"))
    assert [row["transform"] for row in rows][:2] == ["low_frequencies", "to_grid"]
    assert all(row["ms"] > 0 for row in rows)
    with_levels = [row for row in parts.bench_growth(1, torch.device("cpu")) if row["varies"] == "levels"]
    assert {row["method"] for row in with_levels} == {"sfkd ds2s"}


@pytest.mark.parametrize("index", range(5))
def test_transforms_that_are_compared_are_equal(index):
    import parts

    name, ours, _, plain = list(parts.transforms(torch.device("cpu")))[index]
    x = torch.randn(2, parts.CHANNELS, 16, 16)
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


def test_bench_of_small_students(monkeypatch):
    import small_student

    monkeypatch.setattr(small_student, "METHODS", ["kd", "sfkd"])
    monkeypatch.setattr(small_student, "BATCH", 4)
    rows = small_student.bench_small_student(2, torch.device("cpu"))
    assert [row["method"] for row in rows] == ["ce", "kd", "sfkd"]
    assert [row["added_parameters"] > 0 for row in rows] == [False, False, True]
    assert all(row["ratio"] > 0 and row["memory_ratio"] > 0.9 for row in rows)
    assert rows[2]["operations"] > rows[1]["operations"] > rows[0]["operations"]
