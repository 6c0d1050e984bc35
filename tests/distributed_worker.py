"""What `test_distributed.py` launches: first steps and an evaluation, by one process or several.

torchrun --nproc_per_node 2 tests/distributed_worker.py OUT.pt
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import tiny_norm_free, tiny_vit

from hetkd import Distiller
from hetkd.training.evaluate import eval_loader, measure

CASES = {
    "kd": ("kd", {}),
    "sfkd": ("sfkd", {"decorrelation": 0.01}),
    "sfkd, infonce": ("sfkd", {"loss": "infonce"}),
    "sfkd, pca and mse": ("sfkd", {"width": 8, "reduction": "pca", "loss": "mse"}),
    "uhkd": ("uhkd", {}),
    "dist": ("dist", {}),
    "crd": ("crd", {"negatives": 16}),
    "ce and kd and crd": (["dkd", "crd"], {}),
}


def make(method: str, options: dict) -> Distiller:
    torch.manual_seed(0)
    return Distiller(tiny_vit(), tiny_norm_free(), method, input_size=64, **options)


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
    data = torch.rand(21, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(21) % 10
    loader = accelerator.prepare_data_loader(eval_loader(distiller, data, 4, 0), device_placement=False)
    return measure(distiller, distiller.student, loader, accelerator.device, accelerator)


def training() -> dict[str, float]:
    """Returns the last record of a short run of `fit`, and a sum over the student it made."""
    distiller = make("sfkd", {})
    data = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(32) % 10
    result = distiller.fit(data, data, epochs=1, batch_size=8, cpu=True, progress=False)
    return {**result.history[-1], "weights": sum(p.double().sum().item() for p in distiller.student.parameters())}


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    results = {
        "processes": accelerator.num_processes,
        "steps": {name: first_step(accelerator, *case) for name, case in CASES.items()},
        "evaluation": evaluation(accelerator),
        "training": training(),
    }
    torch.save(results, out.with_name(f"{out.stem}-{accelerator.process_index}.pt"))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
