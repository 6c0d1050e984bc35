"""Kill a training again and again, and check that the result equals an undisturbed one, bit for bit.

    python recipes/research/torture.py --kills 20
    python recipes/research/torture.py --kills 200 --seed 1

A child process with two loading processes trains a small CNN under a small ViT and writes a checkpoint after almost
every step. At a random moment, writing included, the whole process group gets SIGKILL, SIGTERM, or SIGUSR1 and then
SIGTERM, as clusters send them. The child starts again with resume=True, and so on; after the last kill it may finish.
Student, average of weights and history must equal those of a run that was left alone. A run that was asked to end has
to save itself and exit with 143, unless it had not begun to train.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import kornia.augmentation as K
import timm
import torch
from safetensors.torch import load_file

from hetkd import Distiller
from hetkd.training.checkpoint import CHECKPOINTS, HISTORY, RunFolder

SIGNALS = ((signal.SIGKILL,), (signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM))
TIMING = ("seconds", "images_per_second")


def train(folder: Path, method: str) -> None:
    """Train from the newest checkpoint in ``folder`` to the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    teacher = timm.create_model("vit_tiny_patch16_224", **vit)
    student = timm.create_model("test_resnet", num_classes=10, drop_path_rate=0.1)
    distiller = Distiller(teacher, student, method, input_size=32)
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    distiller.fit(
        (images, torch.arange(64) % 10),
        (images[:20], torch.arange(20) % 10),
        epochs=3,
        batch_size=8,
        num_workers=2,
        output_dir=folder,
        resume=True,
        augment=K.RandomHorizontalFlip(p=0.5),
        mixup=0.2,
        ema=0.9,
        checkpoint_steps=3,
        cpu=True,
        progress=False,
    )


def in_child(folder: Path, method: str, seconds: float = 0.0, signals: tuple[int, ...] = ()) -> bool:
    """Train in a child process, and send its group signals after so many seconds; say whether it finished before.

    Raises:
        RuntimeError: If the training failed, or did not end as its last signal demands.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            train(folder, method)
        except SystemExit as asked_to:
            os._exit(asked_to.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    time.sleep(seconds)
    for number in signals:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(child, number)
        time.sleep(0.02)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # fit heeds signals once it trains; before, they end a process by themselves.
    asked = (128 + signal.SIGTERM, *(-number for number in signals)) if signals else ()
    if status not in (0, *asked):
        raise RuntimeError(f"the training ended with {status}; its traceback is above.")
    return status == 0


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Return all tensors of the last checkpoint and the saved student, and the history without its timing."""
    import json

    saved = RunFolder(folder, resume=True).load_checkpoint()
    assert saved is not None
    tensors = {**saved.tensors, **load_file(folder / "last.safetensors")}
    history = json.loads((folder / HISTORY).read_text())
    return tensors, [{name: value for name, value in record.items() if name not in TIMING} for record in history]


def torture(kills: int, method: str, seed: int, folder: Path) -> int:
    """Kill a run ``kills`` times and compare it with a whole one.

    Returns:
        How many of the kills hit a run that was under way and had written a checkpoint before.

    Raises:
        AssertionError: If anything differs.
    """
    start = time.perf_counter()
    in_child(folder / "whole", method)
    whole_seconds = time.perf_counter() - start
    generator, hits, run = random.Random(seed), 0, 0
    expected = result(folder / "whole")
    killed = 0
    while killed < kills:
        run += 1
        finished = False
        while not finished and killed < kills:
            seconds = generator.uniform(0.1, 0.6) * whole_seconds
            finished = in_child(folder / f"run{run}", method, seconds, generator.choice(SIGNALS))
            killed += not finished
            hits += not finished and any((folder / f"run{run}" / CHECKPOINTS).glob("step-*"))
        if not finished:
            in_child(folder / f"run{run}", method)
        compare(expected, result(folder / f"run{run}"))
    return hits


def compare(
    expected: tuple[dict[str, torch.Tensor], list[dict[str, float]]],
    found: tuple[dict[str, torch.Tensor], list[dict[str, float]]],
) -> None:
    """Raise AssertionError for the first tensor or record that differs in a bit."""
    assert expected[0].keys() == found[0].keys(), "other tensors"
    for name, x in expected[0].items():
        assert torch.equal(x, found[0][name]), f"{name} differs"
    assert expected[1] == found[1], "the histories differ"


def main() -> None:
    """Read the command line, torture, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="sfkd")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        hits = torture(arguments.kills, arguments.method, arguments.seed, Path(folder))
    print(
        f"{arguments.kills} kills, {hits} of them after a first checkpoint, in {time.perf_counter() - start:.0f} s: "
        "student, average and history equal those of an undisturbed run, bit for bit."
    )


if __name__ == "__main__":
    sys.exit(main())
