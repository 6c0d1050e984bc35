"""Classes that count differently: weights, balanced draws, crops of a chosen size."""

import numpy as np
import pytest
import torch
from conftest import tiny_cnn, tiny_vit
from PIL import Image
from torch import nn
from training_runs import QUIET, bright_or_dark

from hetkd import Distiller
from hetkd.training import Callback, TrainingOptions
from hetkd.training.groups import class_weights
from hetkd.training.setup import _balanced_sampler


def alone(**options) -> Distiller:
    return Distiller(None, tiny_cnn(**options), "ce", input_size=32)


def test_arrays_are_class_weights_and_a_single_callback_is_explained():

    options = TrainingOptions(class_weights=np.array([1.0, 2.0]))
    assert options.class_weights == [1.0, 2.0]
    assert TrainingOptions(class_weights=torch.tensor([3.0])).settings()["class_weights"] == [3.0]
    with pytest.raises(TypeError, match=r"must be a list: callbacks=\[...\]"):
        TrainingOptions(callbacks=print)


def test_options_that_would_do_nothing_are_refused():
    data = bright_or_dark(16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=8)
    with pytest.raises(ValueError, match="a loader has a sampler of its own"):
        alone().fit(loader, epochs=1, balanced_sampling=True, **QUIET)
    distiller = Distiller(tiny_vit(), tiny_cnn(), "kd", ce_weight=0, input_size=32)
    with pytest.raises(ValueError, match="ce_weight=0 leaves it out"):
        distiller.fit(data, epochs=1, class_weights=[1] * 10, **QUIET)


def test_balanced_class_weights_equal_those_by_hand():
    labels = torch.tensor([0, 0, 0, 1])
    weights = class_weights(TrainingOptions(class_weights="balanced"), labels.bincount(minlength=3), 3)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1), 0])
    assert weights[labels].mean() == pytest.approx(1)
    assert class_weights(TrainingOptions(class_weights=[1, 2, 3]), None, 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="class_weights has 2 numbers from 1 for 3 classes"):
        class_weights(TrainingOptions(class_weights=[1, 2]), None, 3)


def test_class_weights_are_in_the_cross_entropy_of_the_run_alone():
    images, labels = bright_or_dark(32)
    labels = torch.where(labels < 8, 0, 1)
    torch.manual_seed(0)
    distiller = alone(num_classes=2)
    with torch.no_grad():
        logits = distiller.student_tap.run(images).logits
    expected = nn.functional.cross_entropy(logits, labels, torch.tensor([0.0, 1.0])).item()
    torch.manual_seed(0)
    again = alone(num_classes=2)
    result = again.fit((images, labels), epochs=1, batch_size=32, lr=1e-9, class_weights=[0, 1], **QUIET)
    assert again.method.class_weights is None
    assert result.history[0]["train/ce"] == pytest.approx(expected, rel=1e-4)
    unweighted = alone(num_classes=2).fit((images, labels), epochs=1, batch_size=32, lr=1e-9, **QUIET)
    assert result.history[0]["train/ce"] != pytest.approx(unweighted.history[0]["train/ce"], rel=1e-3)


def folders(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (index, index, index)).save(root / name / f"{index}.png")
    return root


def test_balanced_sampling_draws_each_class_alike(tmp_path):
    from hetkd.data.images import make_dataset

    distiller = alone(num_classes=2)
    spec = distiller.student_inputs.spec
    dataset = make_dataset(folders(tmp_path, {"a": 60, "b": 6}), what="train", spec=spec, size=(32, 32), train=True)
    torch.manual_seed(0)
    drawn = torch.tensor([int(index >= 60) for _ in range(20) for index in _balanced_sampler(dataset)])
    assert drawn.double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_balanced_run_resumes_exactly(tmp_path):
    train = folders(tmp_path / "train", {"a": 30, "b": 6})
    common = {"epochs": 2, "batch_size": 6, "balanced_sampling": True, "checkpoint_steps": 1, **QUIET}
    torch.manual_seed(0)
    whole = alone(num_classes=2)
    whole.fit(train, output_dir=tmp_path / "whole", **common)

    class Interrupt(Callback):
        def on_step(self, moment):
            if moment.step == 3:
                raise KeyboardInterrupt

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        alone(num_classes=2).fit(train, output_dir=tmp_path / "part", callbacks=[Interrupt()], **common)
    resumed = alone(num_classes=2)
    resumed.fit(train, output_dir=tmp_path / "part", resume=True, **common)
    for name, x in whole.student.state_dict().items():
        assert torch.equal(x, resumed.student.state_dict()[name]), name


@pytest.mark.parametrize("options", [{"balanced_sampling": True}, {"class_weights": "balanced"}])
def test_balance_needs_labels_that_are_known(options):
    class Unknown(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(3, 32, 32), index % 2

    with pytest.raises(ValueError, match="needs labels that are known"):
        alone(num_classes=2).fit(Unknown(), epochs=1, batch_size=4, **options, **QUIET)


def test_random_crops_keep_the_share_that_is_asked_for(tmp_path):
    from hetkd.data.transforms import crop_transform

    spec = alone().student_inputs.spec
    ramp = torch.arange(100.0).repeat(3, 100, 1)
    for min_crop, least in ((0.08, 0), (0.9, 70), (1.0, 99)):
        torch.manual_seed(0)
        crop = crop_transform(spec, (100, 100), True, min_crop)
        spans = [float(y.max() - y.min()) for y in (crop(ramp) for _ in range(30))]
        assert min(spans) >= least
    assert min(spans) == 99
