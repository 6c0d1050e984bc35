"""What `test_distributed.py` launches: steps, trainings and an evaluation, by one process or several.

torchrun --nproc_per_node 2 tests/distributed_worker.py OUT.pt
"""

import importlib
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from conftest import tiny_cnn, tiny_norm_free, tiny_vit
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from hetkd import Distiller, load_model
from hetkd.data.samples import Keys
from hetkd.training import TrainingDiverged, setup
from hetkd.training.accelerator import make_accelerator
from hetkd.training.evaluate import eval_loader, measure

CASES = {
    "kd": ("kd", {}),
    "sfkd": ("sfkd", {"ds2s": "full"}),
    "sfkd, infonce": ("sfkd", {"loss": "infonce"}),
    "sfkd, pca and mse": ("sfkd", {"width": 8, "reduction": "pca", "loss": "mse"}),
    "uhkd": ("uhkd", {}),
    "dist": ("dist", {}),
    "crd": ("crd", {"negatives": 16}),
    "ce and kd and crd": (["dkd", "crd"], {}),
}
BATCH = 16 // int(os.environ.get("WORLD_SIZE", "1"))
SETTINGS = {"batch_size": BATCH, "optimizer": "sgd", "cpu": True, "progress": False, "log_every": 1}


def make(method: str, options: dict) -> Distiller:
    torch.manual_seed(0)
    return Distiller(tiny_vit(), tiny_norm_free(), method, input_size=64, **options)


def data(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(count) % 10


def first_step(accelerator: Accelerator, method: str, options: dict) -> dict:
    """Returns loss and gradients of the first step on a global batch of 8."""
    distiller = make(method, options)
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
    model = accelerator.prepare(distiller)
    share = 8 // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    output = model(images[mine], labels[mine])
    accelerator.backward(output.loss)
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    return {"loss": accelerator.reduce(output.loss.detach(), "mean"), "gradients": gradients}


def evaluation(accelerator: Accelerator) -> dict[str, float]:
    """Returns the metrics on 21 images, which no number of processes but 1, 3, 7 and 21 divides."""
    distiller = make("kd", {})
    images, labels = data(21)
    loader = accelerator.prepare_data_loader(
        eval_loader(distiller, (images, labels), 4, 0, Keys(), []), device_placement=False
    )
    return measure(distiller, distiller.student, loader, accelerator.device, accelerator)


def dense_evaluation(accelerator: Accelerator) -> dict[str, float]:
    """Returns the metrics of a segmenter on 21 images with masks."""
    torch.manual_seed(0)
    student = load_model("timm:test_resnet", pretrained=False, task="segmentation", num_classes=3)
    distiller = Distiller(None, student, "ce", input_size=64)
    masks = torch.randint(0, 3, (21, 32, 32), generator=torch.Generator().manual_seed(3))
    loader = accelerator.prepare_data_loader(
        eval_loader(distiller, (data(21)[0], masks), 4, 0, Keys(), []), device_placement=False
    )
    return measure(distiller, distiller.student, loader, accelerator.device, accelerator)


def training(method: str = "sfkd", options: dict | None = None, *, labels: bool = True, **settings) -> dict:
    """Returns the last record of a short run of `fit`, and the student it made."""
    distiller = make(method, options or {})
    train = data() if labels else data()[0]
    result = distiller.fit(train, data(), **{"epochs": 1, **SETTINGS, **settings})
    return {
        **result.history[-1],
        "weights": {name: p.detach() for name, p in distiller.student.named_parameters()},
        "sharded_teacher": [type(p.data).__name__ for p in distiller.teacher.parameters()].count("DTensor"),
    }


fitting = importlib.import_module("hetkd.training.fit")  # the function of this name hides the module


@contextmanager
def configuration(kind: DistributedType, **state):
    """Makes `fit` find FSDP 2 or DeepSpeed in Accelerate's configuration, which Accelerate heeds on GPUs only."""

    def configured(options, folder):
        accelerator = make_accelerator(options, folder)
        PartialState._shared_state["distributed_type"] = kind
        AcceleratorState._shared_state |= {"distributed_type": kind, **state}
        return accelerator

    fitting.make_accelerator = configured
    try:
        yield
    finally:
        fitting.make_accelerator = make_accelerator


class AtStep:
    """An augmentation that does something once, in the last process."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action, self.count = step, action, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.count += 1
        is_last = PartialState().process_index == PartialState().num_processes - 1
        return self.action(images) if is_last and self.count == self.step else images

    def __repr__(self) -> str:
        return "AtStep()"


def broken(images: torch.Tensor) -> torch.Tensor:
    return images * float("nan")


def told(number: int):
    def tell(images: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return images

    return tell


def diverging(folder: Path) -> dict:
    """Returns the message of a run that broke in one process, and the last record of one that went back."""
    message = ""
    try:
        training("kd", augment=AtStep(2, broken))
    except TrainingDiverged as error:
        message = str(error)
    returned = training("kd", augment=AtStep(2, broken), returns=1, checkpoint_steps=1, output_dir=folder)
    return {"message": message, "returned": returned}


def stopped(folder: Path, **settings) -> dict:
    """Returns what a run made that was stopped by a signal to one process, and resumed."""
    status = 0
    try:
        training(augment=AtStep(1, told(signal.SIGTERM)), output_dir=folder, **settings)
    except SystemExit as error:
        status = error.code
    checkpoints = [path.name for path in (folder / "checkpoints").iterdir()]
    resumed = training(augment=AtStep(0, broken), output_dir=folder, resume=True, **settings)
    return {"status": status, "checkpoints": checkpoints, "resumed": resumed}


def with_running_statistics(**settings) -> dict:
    """Returns the loss that a run recorded of a student with batch norm, and what each process's student has."""
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", input_size=64)
    recorded = distiller.fit(data(), data(21), epochs=1, **{**SETTINGS, **settings}).history[-1]["loss"]
    return {"recorded": recorded, "again": distiller.evaluate(data(21))["loss"]}


class Damaged(torch.utils.data.Dataset):
    """Images of which some cannot be read."""

    def __init__(self, unreadable: set[int]) -> None:
        self.unreadable, (self.images, self.labels) = unreadable, data()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        if index in self.unreadable:
            raise OSError("damaged")
        return self.images[index], self.labels[index]


class Branching(nn.Module):
    """Bright images take a way of their own; an extra head runs in training, and no loss depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.extra, self.head = nn.Linear(8, 2), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x.mean((1, 2, 3)) > 1.5
        x = self.stem(x)
        if bright.any():
            x = torch.where(bright[:, None, None, None], self.branch(x), x)
        if self.training:
            self.extra(x.mean((2, 3)))
        return self.head(x.mean((2, 3)))


def branching() -> dict:
    """Returns a student of which few batches of one process, and no image at the start, reach a branch."""
    torch.manual_seed(0)
    student = Branching()
    before = student.branch.weight.detach().clone()
    images, labels = data(64)
    images[5] = 1.0
    distiller = Distiller(None, student, "ce", input_size=32)
    result = distiller.fit((images, labels), data(), epochs=1, **SETTINGS)
    weights = {name: p.detach() for name, p in student.named_parameters()}
    return {**result.history[-1], "weights": weights, "moved": (student.branch.weight - before).abs().sum().item()}


def skipping() -> dict[str, float]:
    """Returns the last record of a run over images of which six cannot be read."""
    train = Damaged({1, 4, 9, 16, 25, 31})
    return make("kd", {}).fit(train, epochs=1, unreadable="skip", **SETTINGS).history[-1]


def sharded(folder: Path) -> dict:
    """Returns what a run made whose student FSDP shards, and one that was stopped and resumed."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    units = []
    with configuration(DistributedType.FSDP, fsdp_plugin=plugin), watched(units):
        results = {"whole": training(augment=AtStep(0, broken)), **stopped(folder), "units": units}
        plugin.set_mixed_precision("bf16")  # as Accelerate does for an option of fit
        return {**results, "bf16": training(mixed_precision="bf16")}


@contextmanager
def watched(units: list[str]):
    """Notes the modules of a prepared model that FSDP shards by themselves."""

    def prepare(*arguments):
        model, optimizer = original(*arguments)
        units.extend(type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule))
        return model, optimizer

    original, setup.prepare = setup.prepare, prepare
    try:
        yield
    finally:
        setup.prepare = original


def with_deepspeed(out: Path) -> None:
    """Writes what runs made under DDP and under DeepSpeed."""
    ddp = training()
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}
    zero = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    plugin = DeepSpeedPlugin(hf_ds_config={**sizes, **zero})
    plugin.select(_from_accelerator_state=True)
    with configuration(DistributedType.DEEPSPEED, deepspeed_plugins={"default": plugin}):
        deepspeed = training(output_dir=out.with_suffix(""))
    torch.save({"ddp": ddp, "deepspeed": deepspeed}, out.with_name(f"{out.stem}-{os.environ['RANK']}.pt"))


class Seen:
    """An augmentation that notes which images a process trains on; they are constant."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.values += (images[:, 0, 0, 0] * 1000).round().int().tolist()
        return images

    def __repr__(self) -> str:
        return "Seen()"


class OwnOrder(RandomSampler):
    """A RandomSampler by inheritance only."""

    def __iter__(self):
        return iter(reversed(range(len(self.data_source))))


def sampled() -> dict:
    """Returns the images that each process trained on, and the accuracy on a shuffled subset, by sampler."""
    images = (torch.arange(48) / 1000)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    labels = torch.arange(48) % 10
    found = {}
    for name in ("subset", "subset with a generator", "own", "weighted"):
        dataset = TensorDataset(images, labels)
        sampler = {
            "subset": lambda: SubsetRandomSampler(range(48)),
            "subset with a generator": lambda: SubsetRandomSampler(
                range(48), generator=torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
            ),
            "own": lambda dataset=dataset: OwnOrder(dataset),
            "weighted": lambda: WeightedRandomSampler(torch.ones(48), 48, replacement=False),
        }[name]()
        seen, distiller = Seen(), Distiller(None, tiny_norm_free(), "ce", input_size=32)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler)
        val = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(range(0, 48, 2)))
        result = distiller.fit(loader, val, epochs=1, augment=seen, cpu=True, progress=False)
        expected = distiller.evaluate((images[::2], labels[::2]))
        found[name] = {"seen": seen.values, "found": result.history[0]["loss"], "expected": expected["loss"]}
    return found


def compiled() -> dict:
    """Returns what a run made whose models and method are compiled, as far as that goes without a C++ compiler."""
    original = Distiller.compile
    Distiller.compile = lambda self: original(self, backend="eager")
    try:
        return training(compile=True)
    finally:
        Distiller.compile = original


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    folder = out.with_name(f"{out.stem}-runs")
    results = {
        "processes": accelerator.num_processes,
        "steps": {name: first_step(accelerator, *case) for name, case in CASES.items()},
        "evaluation": evaluation(accelerator),
        "dense": dense_evaluation(accelerator),
        "training": training(),
        "teacher sharded": training(teacher_placement="sharded"),
        "teacher offloaded": training(teacher_placement="offloaded"),
        "label-free": training("sfkd", {"ce_weight": 0, "kd_weight": 0}, labels=False),
        "branching": branching(),
        "middle stages": training("fitnet", {"ce_weight": 0, "stages": [1]}, labels=False),
    }
    if accelerator.num_processes > 1:
        results |= {
            "batch norm": with_running_statistics(),
            "batch norm, averaged": with_running_statistics(ema=0.5),
            "skipping": skipping(),
            "sampled": sampled(),
            "diverging": diverging(folder / "diverging"),
            "stopped": stopped(folder / "stopped"),
            "stopped, too": stopped(folder / "stopped-too", checkpoint_steps=1, log_every=100),
            "undisturbed": training(augment=AtStep(0, broken)),
            "sharded": sharded(folder / "sharded"),
            "bf16": training(mixed_precision="bf16"),
            "compiled": compiled(),
        }
    torch.save(results, out.with_name(f"{out.stem}-{PartialState().process_index}.pt"))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "dies":
        training(augment=AtStep(3, told(signal.SIGKILL)), epochs=1000)
    elif "deepspeed" in sys.argv[1]:
        with_deepspeed(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
