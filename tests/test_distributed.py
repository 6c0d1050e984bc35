"""Two processes on gloo give what one process gives at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES

HERE = Path(__file__).parent


def launch(processes: int, out: Path) -> list[dict]:
    # On the CPU, accelerate launch starts one process (or leaves it to MPI); torchrun is what it calls for several.
    launchers = {
        1: ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
        2: ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    command = [sys.executable, "-m", *launchers[processes]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
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


def test_fit_leaves_all_processes_with_one_student(one_and_two):
    _, (first, second) = one_and_two
    assert first["training"]["weights"] == second["training"]["weights"]
    assert first["training"]["top1"] == second["training"]["top1"]
