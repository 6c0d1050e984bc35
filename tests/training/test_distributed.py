"""Two processes on gloo give what one process gives at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES
from running import finish

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run(processes: int, argument: str, timeout: float) -> subprocess.CompletedProcess:
    # On the CPU, accelerate launch starts one process (or leaves it to MPI); torchrun is what it calls for several.
    launchers = {
        1: ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
        2: ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    return finish(
        [sys.executable, "-m", *launchers[processes], str(HERE / "distributed_worker.py"), argument],
        timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])},
    )


def launch(processes: int, out: Path) -> list[dict]:
    done = run(processes, str(out), 280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out.with_name(f"{out.stem}-{rank}.pt"), weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("distributed")
    return launch(1, folder / "one.pt")[0], launch(2, folder / "two.pt")


def test_processes_are_as_many_as_launched(one_and_two):
    one, two = one_and_two
    assert (one["processes"], two[0]["processes"], two[1]["processes"]) == (1, 2, 2)


@pytest.mark.parametrize("case", CASES)
def test_first_step_has_the_same_loss_and_gradients(one_and_two, case):
    one, two = one_and_two[0]["steps"][case], one_and_two[1][0]["steps"][case]
    torch.testing.assert_close(two["loss"], one["loss"], atol=1e-5, rtol=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        tolerance = 1e-4 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(two["gradients"][name], gradient, atol=tolerance, rtol=1e-3, msg=name)


def test_every_validation_image_counts_once(one_and_two):
    one, two = one_and_two
    assert two[0]["evaluation"] == pytest.approx(one["evaluation"], rel=1e-4)
    assert two[1]["evaluation"] == pytest.approx(one["evaluation"], rel=1e-4)


def test_every_pixel_counts_once(one_and_two):
    one, two = one_and_two
    assert two[0]["dense"] == pytest.approx(one["dense"], rel=1e-6)
    assert set(one["dense"]) == {"miou", "pixel_accuracy", "loss", "iou/0", "iou/1", "iou/2"}


def assert_same(found: dict, expected: dict, tolerance: float = 0.0) -> None:
    """Compares two students and their metrics."""
    torch.testing.assert_close(found["weights"], expected["weights"], atol=tolerance, rtol=0)
    scores = [name for name in ("top1", "knn", "agreement") if name in expected]
    assert scores
    for name in scores:
        assert found[name] == pytest.approx(expected[name], rel=1e-9 if name == "top1" else 1e-3), name


def test_fit_makes_the_same_student_in_one_process_and_two(one_and_two):
    one, (first, second) = one_and_two
    assert_same(second["training"], first["training"])
    assert_same(first["training"], one["training"], tolerance=1e-4)


@pytest.mark.parametrize("placement", ["sharded", "offloaded"])
def test_a_teacher_elsewhere_teaches_the_same(one_and_two, placement):
    one, (two, _) = one_and_two
    for results in (one, two):
        assert_same(results[f"teacher {placement}"], results["training"], tolerance=1e-5)
        assert results["training"]["sharded_teacher"] == 0
        assert results[f"teacher {placement}"]["sharded_teacher"] > 10


def test_a_compiled_student_learns_the_same(one_and_two):
    _, (first, second) = one_and_two
    for results in (first, second):
        assert_same(results["compiled"], first["training"], tolerance=1e-5)


def test_a_student_that_is_sharded_learns_the_same_and_resumes(one_and_two):
    _, (first, second) = one_and_two
    assert_same(first["sharded"]["whole"], first["training"], tolerance=1e-5)
    assert "FSDPConvNeXtBlock" in first["sharded"]["units"], "blocks are sharded one by one"
    for results in (first, second):
        assert_same(results["sharded"]["resumed"], first["sharded"]["whole"])


def test_a_student_that_is_sharded_learns_the_same_in_half_precision(one_and_two):
    _, (first, _) = one_and_two

    def distance(one: dict, other: dict) -> float:
        return sum((x - other["weights"][name]).square().sum().item() for name, x in one["weights"].items()) ** 0.5

    by_rounding = distance(first["bf16"], first["training"])
    assert 0 < distance(first["sharded"]["bf16"], first["bf16"]) < 2 * by_rounding
    assert first["sharded"]["bf16"]["train/kd"] == pytest.approx(first["bf16"]["train/kd"], rel=0.01)


@pytest.mark.parametrize("case", ["label-free", "middle stages"])
def test_parameters_without_a_loss_do_not_hold_ddp_up(one_and_two, case):
    one, (two, _) = one_and_two
    assert_same(two[case], one[case], tolerance=1e-4)


def test_a_branch_that_few_images_reach_is_trained_by_all_processes(one_and_two):
    one, (first, second) = one_and_two
    assert one["branching"]["moved"] > 0
    assert_same(second["branching"], first["branching"])
    assert_same(first["branching"], one["branching"], tolerance=1e-6)


def test_a_signal_to_one_process_stops_all_and_the_run_resumes_exactly(one_and_two):
    _, both = one_and_two
    for results in both:
        for run in ("stopped", "stopped, too"):
            assert results[run]["status"] == 143
            assert results[run]["checkpoints"] == ["step-000000001"]
            assert_same(results[run]["resumed"], results["undisturbed"])


def test_one_process_that_diverges_ends_or_turns_back_all(one_and_two):
    _, (first, second) = one_and_two
    assert "another process is NaN or Inf at epoch 1, step 2" in first["diverging"]["message"]
    assert "is nan at epoch 1, step 2" in second["diverging"]["message"]
    assert_same(second["diverging"]["returned"], first["diverging"]["returned"])
    assert first["diverging"]["returned"]["train/ce"] > 0


@pytest.mark.parametrize("case", ["batch norm", "batch norm, averaged"])
def test_all_processes_evaluate_the_student_that_is_saved(one_and_two, case):
    _, (first, second) = one_and_two
    assert first[case]["again"] == second[case]["again"] == pytest.approx(first[case]["recorded"], rel=1e-5)


def test_unreadable_images_of_all_processes_count(one_and_two):
    _, (first, second) = one_and_two
    assert first["skipping"]["unreadable_images"] == second["skipping"]["unreadable_images"] == 6


@pytest.mark.parametrize("name", ["subset", "subset with a generator", "own", "weighted"])
def test_every_image_of_any_sampler_comes_once(one_and_two, name):
    _, both = one_and_two
    first, second = (results["sampled"][name] for results in both)
    assert sorted(first["seen"] + second["seen"]) == list(range(48))
    assert first["found"] == second["found"] == pytest.approx(first["expected"], rel=1e-5)


def test_a_process_that_dies_ends_the_run():
    done = run(2, "dies", 120)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr


def test_gloo_ends_before_the_interpreter():
    code = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("still there:", dist.is_initialized()))  # the first to register is the last to run
import hetkd.training.accelerator
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
    done = finish([sys.executable, "-c", code], 100)
    assert done.stdout == "still there: False\n", done.stderr


def test_deepspeed_trains_the_same_student(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed; it is not part of the test extra")
    done = run(2, str(tmp_path / "deepspeed.pt"), 200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "deepspeed-0.pt", weights_only=True)
    assert_same(results["deepspeed"], results["ddp"], tolerance=1e-5)
    assert (tmp_path / "deepspeed" / "last.safetensors").exists()
