r"""Packs what `gpu.py` and `dense.py` need on a machine without a network, in parts that fit into a call of the tool.

    HETKD_DATA=../shared/data python recipes/research/gpu_pack.py cifar100        # writes runs/gpu/part1 ... part4
    HETKD_DATA=../shared/data python recipes/research/gpu_pack.py camvid dinov2   # for dense.py

The parts hold the data, EfficientNet-Lite0's weights in half precision, wheels of what the machine lacks, hetkd as last
committed, and the recipes. What travels in a call has 64 MiB together, the tracked files of the repository included,
which leaves half of it for a part.

The calls, one at once after the other, while the machine is warm; each carries its part (`carry: ["runs/gpu/part1"]`).
The first installs the wheels and rehearses `gpu.py` on random images (timeout 170 s):

    set -e; export PYTHONUNBUFFERED=1; O=$(realpath $OUT); nvidia-smi -L; python3 -V; mkdir -p /tmp/gpu
    cp -r runs/gpu/part1/. /tmp/gpu/; cp recipes/research/*.py /tmp/gpu/recipes/research/
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site \
        /tmp/gpu/wheels/*.whl
    cd /tmp/gpu; export PYTHONPATH=/tmp/site:/tmp/gpu/recipes/bench
    python3 recipes/research/gpu.py --dry --random --steps study cost rest --teacher /tmp/dry.safetensors --output $O

The others bring data (`partN` is part2, part3; timeout 60 s); files of more than 20 MiB travel in pieces:

    mkdir -p /tmp/gpu; cp -r runs/gpu/partN/. /tmp/gpu/; find /tmp/gpu -name '*.webp' | wc -l
    for f in $(find /tmp/gpu -name '*.piece0'); do cat ${f%0}* > ${f%.piece0}; done

The last works for nine minutes (timeout 590 s); its lines, log and teacher come back from $OUT:

    export PYTHONUNBUFFERED=1; O=$(realpath $OUT); mkdir -p /tmp/gpu
    for part in runs/gpu/part*; do cp -rn $part/. /tmp/gpu/; done
    cd /tmp/gpu; export HETKD_DATA=/tmp/gpu PYTHONPATH=/tmp/site:/tmp/gpu/recipes/bench
    python3 recipes/research/gpu.py --minutes 8.8 --revision $(cat revision.txt) --teacher /tmp/gpu/lite0.safetensors \
        --output $O 2>&1 | tee $O/log.txt; cp /tmp/gpu/lite0.safetensors $O

For CamVid there are two parts, and the last call is

    python3 recipes/research/dense.py --minutes 8.8 --revision $(cat revision.txt) --data /tmp/gpu \
        --scratch /tmp/views --output $O 2>&1 | tee $O/log.txt

What the time did not suffice for comes from one more call (`--steps compile`, or `--steps study rest --methods ...`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
WHEELS = ["timm==1.0.31", "kornia==0.9.0", "kornia_rs==0.2.0", "PyWavelets==1.9.0"]
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
WEIGHTS = Path("efficientnet_lite0/tf_efficientnet_lite0_timm.safetensors")
DATA_SETS = {"cifar100": "cifar100", "camvid": "camvid", "dinov2": "dinov2_vits14"}
MOST_IN_A_PART, PIECE = 30 * 2**20, 20 * 2**20


def main() -> None:
    """Gather everything in one folder, then deal its files out to the parts."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        gathered = Path(name) / "all"
        pack_code(gathered, Path(name) / "code")
        pack_wheels(gathered / "wheels")
        pack_data(gathered, arguments)
        sizes = deal(gathered, arguments.output, [DATA_SETS[data_set] for data_set in arguments.data_sets])
    for number, size in enumerate(sizes, start=1):
        print(f"{arguments.output / f'part{number}'}: {size / 2**20:.1f} MiB")


def pack_code(folder: Path, scratch: Path) -> None:
    """Add a wheel of hetkd as it was last committed, and the recipes as they are."""
    revision, archive = (git(words) for words in ("describe --always --dirty --abbrev=12", "archive HEAD"))
    scratch.mkdir()
    subprocess.run(["tar", "x", "-C", str(scratch)], input=archive, check=True)
    for name in ("bench", "research"):
        shutil.copytree(
            ROOT / "recipes" / name, folder / "recipes" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    (folder / "revision.txt").write_bytes(revision)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheels")]
    subprocess.run(build, cwd=scratch, check=True)


def git(words: str) -> bytes:
    """Return what git prints."""
    return subprocess.run(["git", "-C", str(ROOT), *words.split()], capture_output=True, check=True).stdout


def pack_wheels(folder: Path) -> None:
    """Add wheels for Python 3.12 on Linux, without their dependencies, which the machine has."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    python = ["--python-version", "3.12", "--implementation", "cp", *platforms]
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *python]
    subprocess.run([*download, "-d", str(folder), *WHEELS], check=True)


def pack_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Add the data sets, large files in pieces, and the teacher's weights in half precision."""
    for name in (DATA_SETS[data_set] for data_set in arguments.data_sets):
        shutil.copytree(arguments.data / name, folder / name, copy_function=shutil.copyfile)
        for file in [file for file in (folder / name).rglob("*") if file.is_file() and file.stat().st_size > PIECE]:
            content = file.read_bytes()
            for number, start in enumerate(range(0, len(content), PIECE)):
                file.with_name(f"{file.name}.piece{number}").write_bytes(content[start : start + PIECE])
            file.unlink()
    (folder / WEIGHTS).parent.mkdir()
    state = load_file(arguments.data / WEIGHTS)
    halves = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    save_file(halves, folder / WEIGHTS)


def deal(gathered: Path, output: Path, data_sets: list[str]) -> list[int]:
    """Move files to the parts, code and wheels first, then one data set after another; return the sizes of the parts.

    The code is tried before the data travel. Each file goes to the first part that has room for it, large files first.
    """
    order = {name: number for number, name in enumerate(data_sets, start=1)}
    files = [path for path in gathered.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (order.get(path.relative_to(gathered).parts[0], 0), -path.stat().st_size))
    for part in output.glob("part*"):
        shutil.rmtree(part)
    sizes: list[int] = []
    for path in files:
        size, relative = path.stat().st_size, path.relative_to(gathered)
        fitting = (number for number, used in enumerate(sizes) if used + size <= MOST_IN_A_PART)
        part_number = next(fitting, len(sizes))
        sizes += [0] * (part_number == len(sizes))
        sizes[part_number] += size
        target = output / f"part{part_number + 1}" / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    return sizes


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data_sets", nargs="+", choices=list(DATA_SETS), metavar="DATA_SET", help=f"of {list(DATA_SETS)}"
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HETKD_DATA", "")), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
