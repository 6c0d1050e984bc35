"""Everything a hurried person does wrong gets a clear error, before any training."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hetkd import KD, Distiller, load_model
from hetkd.models import save_model
from hetkd.training import TrainingDiverged


def make(**kwargs) -> Distiller:
    arguments = {"teacher": tiny_vit(), "student": tiny_cnn(), "method": "sfkd", "input_size": 64, **kwargs}
    return Distiller(**arguments)


def fit(train=None, **kwargs) -> None:
    make(method="kd").fit(
        train if train is not None else batch(16), **{"epochs": 1, "progress": False, "cpu": True, **kwargs}
    )


def step(images=None, labels=None, **kwargs) -> None:
    good = batch()
    make(**kwargs)(good[0] if images is None else images, good[1] if labels is None else labels)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*batch(8), strict=True)


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.conv(x)


same = tiny_cnn()
X, Y = batch()
EMPTY = (torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64))

CASES = {
    # names
    "timm model": (lambda: load_model("resnet81"), ValueError, "unknown timm model 'resnet81': did you mean 'resnet"),
    "torchvision model": (lambda: load_model("torchvision:resnet81"), ValueError, "did you mean 'resnet18'"),
    "library": (lambda: load_model("tim:resnet18"), ValueError, "unknown library 'tim': did you mean 'timm'"),
    "library far off": (lambda: load_model("keras:resnet18"), ValueError, "valid: 'hf', 'timm' and 'torchvision'"),
    "hub": (lambda: load_model("hf:no/such-model"), RuntimeError, "could not load hf:no/such-model"),
    "method": (lambda: make(method="skfd"), ValueError, "unknown method 'skfd': did you mean 'sfkd'"),
    "method type": (lambda: make(method=3), TypeError, "method must be a name"),
    "option": (lambda: make(sgima=0.3), ValueError, "unknown option of method 'sfkd' 'sgima': did you mean 'sigma'"),
    "option beside an object": (lambda: make(method=KD(), sigma=1), TypeError, "belong in the method object"),
    "student stage": (
        lambda: make(stages=["layer5"]),
        ValueError,
        "unknown student stage 'layer5': did you mean 'layer",
    ),
    "teacher stage": (
        lambda: make(stages=[("block.3", "layer4")]),
        ValueError,
        "unknown teacher stage 'block.3': did you mean 'blocks",
    ),
    "stage row": (lambda: make(stages=[7]), ValueError, "row 7, but the automatic pairing has rows 0 to 3"),
    "stages empty": (lambda: make(stages=[]), ValueError, "nothing to compare"),
    "stages of a wrong type": (lambda: make(stages="layer4"), TypeError, "must be a list"),
    "stage of a wrong type": (lambda: make(stages=[1.5]), TypeError, "rows, names or"),
    "stage true": (lambda: make(stages=[True]), TypeError, "rows, names or"),
    "stages without use": (lambda: make(method="kd", stages=[3]), ValueError, "compares no features"),
    "fit option": (
        lambda: fit(learning_rate=1),
        ValueError,
        "unknown option of fit 'learning_rate': it is called 'lr' here",
    ),
    "fit option of others": (lambda: fit(amp=True), ValueError, "'amp': it is called 'mixed_precision' here"),
    "method option of others": (lambda: make(alpha=0.5), ValueError, "'alpha': it is called 'kd_weight' here"),
    "fit option near": (lambda: fit(batchsize=1), ValueError, "did you mean 'batch_size'"),
    "optimizer": (lambda: fit(optimizer="adamww"), ValueError, "unknown optimizer 'adamww': did you mean"),
    "scheduler": (lambda: fit(scheduler="cosin"), ValueError, "did you mean 'cosine'"),
    "precision": (lambda: fit(mixed_precision="fp61"), ValueError, "did you mean 'fp16'"),
    "input_size key": (lambda: make(input_size={"studnet": 64}), ValueError, "did you mean 'student'"),
    # option values
    "levels": (lambda: make(levels=4), ValueError, "levels=4 must be 0, 1, 2 or 3"),
    "broken keep": (lambda: make(keep=2.5), ValueError, "keep=2.5 must be a whole number"),
    "levels too many": (
        lambda: make(levels=3, ds2s="full"),
        ValueError,
        r"levels=3 needs grids of at least 8 x 8.*use levels=2",
    ),
    "keep": (lambda: make(keep=9), ValueError, "keep=9 must be between 1 and"),
    "keep uhkd": (lambda: make(method="uhkd", keep=9), ValueError, "keep=9 must be between 1 and"),
    "sigma": (lambda: make(sigma=-0.1), ValueError, "sigma=-0.1 must be 0 or positive"),
    "wavelet": (lambda: make(wavelet="harr"), ValueError, "did you mean 'haar'"),
    "ds2s": (lambda: make(ds2s="spacial"), ValueError, "unknown ds2s 'spacial': did you mean 'spatial'"),
    "levels without use": (lambda: make(levels=1), ValueError, "levels=1 and .* have no use .*add ds2s='full'"),
    "sigma without use": (
        lambda: make(loss="mse", sigma=0.3),
        ValueError,
        "sigma=0.3 .* but loss='mse' compares pixels",
    ),
    "keep without use": (lambda: make(loss="infonce", keep=3), ValueError, "keep=3 choose frequencies"),
    "wavelet without use": (lambda: make(wavelet="db2"), ValueError, "wavelet='db2' have no use"),
    "temperature": (lambda: make(temperature=0), ValueError, "temperature=0 must be positive"),
    "weight": (lambda: make(feature_weight=math.nan), ValueError, "feature_weight=nan"),
    "stage_weights count": (lambda: make(stage_weights=(1, 2)), ValueError, "has 2 entries for 3 stage pairs"),
    "stage_weights word": (lambda: make(stage_weights="learned"), ValueError, "did you mean 'learnt'"),
    "kd_weight": (lambda: make(method="kd", kd_weight=0.0), ValueError, "kd_weight=0 leaves method 'kd'"),
    "input_size": (lambda: make(input_size=0), ValueError, "input_size has 0"),
    "epochs": (lambda: fit(epochs=0), ValueError, "epochs=0"),
    "batch_size": (lambda: fit(batch_size=0), ValueError, "batch_size=0"),
    "ema": (lambda: fit(ema=1.0), ValueError, "ema=1.0 must be between 0 and 1"),
    "smoothing": (lambda: fit(label_smoothing=1.0), ValueError, "label_smoothing=1.0"),
    "lr": (lambda: fit(lr=-1), ValueError, "lr=-1 must be positive"),
    "lr of a rare optimizer": (lambda: fit(optimizer="rmsprop"), ValueError, "no default learning rate"),
    "augment": (lambda: fit(augment=3), TypeError, "augment must be 'light', 'strong' or a function"),
    "preset": (lambda: fit(augment="lihgt"), ValueError, "unknown augment 'lihgt': did you mean 'light'"),
    "resume nowhere": (lambda: fit(resume=True), ValueError, "resume=True needs the output_dir"),
    # models
    "classes": (
        lambda: make(teacher=tiny_vit(num_classes=7)),
        ValueError,
        "the teacher has 7 classes and the student 10",
    ),
    "teacher without head": (
        lambda: make(teacher=tiny_vit(num_classes=0)),
        ValueError,
        "the teacher has no classifier",
    ),
    "student without head": (lambda: make(student=NoHead(), method="kd"), ValueError, "the student has no classifier"),
    "no teacher": (lambda: make(teacher=None), ValueError, "teacher=None, but SFKD needs one"),
    "teacher type": (lambda: make(teacher=3), TypeError, "teacher must be a string"),
    "student type": (lambda: make(student=3), TypeError, "student must be a string"),
    "same module": (lambda: make(teacher=same, student=same), ValueError, "the same module"),
    "num_classes of a module": (
        lambda: make(num_classes=10),
        ValueError,
        "num_classes is for a student given as a string",
    ),
    "refused size": (
        lambda: make(input_size={"teacher": 48, "student": 64}),
        ValueError,
        r"the teacher vit_tiny_patch16_224 refuses images of 48 x 48 pixels: .*its own is 32 x 32",
    ),
    # images and labels
    "rank": (lambda: step(X[0]), ValueError, r"shape \[B, 3, H, W\], got \[3, 32, 32\]; add a batch axis"),
    "channels": (lambda: step(X[:, :1]), ValueError, "images have 1 channels, but the model takes 3"),
    "NHWC": (lambda: step(X.permute(0, 2, 3, 1)), ValueError, "look like NHWC"),
    "0..255": (lambda: step(X * 255), ValueError, "divide by 255, or pass them as uint8"),
    "normalised": (lambda: step(X * 4 - 2), ValueError, r"normalized=\(mean, std\)"),
    "NaN image": (lambda: step(X * math.nan), ValueError, "images contain NaN or Inf"),
    "integer images": (lambda: step((X * 255).int()), TypeError, "got dtype torch.int32"),
    "images type": (lambda: step([1, 2]), TypeError, "images must be a tensor"),
    "no images": (lambda: step(X[:0], Y[:0]), ValueError, "empty batch"),
    "label range": (lambda: step(labels=Y + 10), ValueError, r"the student has 10 classes \(0 to 9\)"),
    "negative label": (lambda: step(labels=Y - 10), ValueError, "labels range from"),
    "label dtype": (lambda: step(labels=Y.int()), TypeError, r"dtype torch.int32.*labels.long\(\)"),
    "label float": (lambda: step(labels=Y.float()), TypeError, "class indices as int64"),
    "label shape": (lambda: step(labels=Y[:4]), ValueError, r"shape \[4\] for 8 images"),
    "soft label shape": (lambda: step(labels=torch.rand(8, 3)), ValueError, r"not \[8, 10\]"),
    "label type": (lambda: step(labels=[0] * 8), TypeError, "labels must be a tensor"),
    "nothing to learn": (lambda: make(method="ce")(X), ValueError, "learns from labels only"),
    "no terms": (lambda: make(method="ce", ce_weight=0.0)(X, Y), ValueError, "nothing to learn from"),
    "channels of both": (
        lambda: make(student=tiny_cnn(in_chans=1)),
        ValueError,
        "the teacher takes images of 3 channels and the student of 1",
    ),
    "same pair twice": (lambda: make(stages=[3, 3]), ValueError, "the same pair twice"),
    "zero feature_weight": (lambda: make(feature_weight=0.0), ValueError, "feature_weight=0.0 must be positive"),
    # data
    "empty tensors": (lambda: fit(EMPTY), ValueError, "train is empty"),
    "empty loader": (
        lambda: fit(DataLoader(TensorDataset(X, Y), batch_size=9, drop_last=True)),
        ValueError,
        "drop_last=True",
    ),
    "empty iterator": (lambda: fit(iter([]), scheduler="constant"), ValueError, "yields no batch"),
    "no length": (lambda: fit(iter([(X, Y)])), ValueError, "scheduler='constant'"),
    "stream": (lambda: fit(DataLoader(Stream(), batch_size=4)), ValueError, "scheduler='constant'"),
    "warm-up of a stream": (
        lambda: fit(DataLoader(Stream(), batch_size=4), scheduler="constant", warmup_epochs=1),
        ValueError,
        "no warmup_epochs",
    ),
    "empty val": (lambda: fit(val=EMPTY), ValueError, "val is empty"),
    "missing folder": (lambda: fit("no/such/folder"), FileNotFoundError, "train='no/such/folder' is no folder"),
    "data type": (lambda: fit(3), TypeError, "train must be a folder, a dataset"),
    "unequal tensors": (lambda: fit((X, Y[:3])), ValueError, "8 images, but 3 labels"),
    "sample type": (lambda: fit([1, 2, 3]), TypeError, r"must be \(image, label\)"),
    "sample keys": (lambda: fit([{"photo": 1}] * 4), TypeError, r"keys \['photo'\]"),
    "label range in fit": (lambda: fit((X, Y + 10)), ValueError, "the student has 10 classes"),
    "label range in val": (lambda: fit(val=(X, Y + 10)), ValueError, "the student has 10 classes"),
    "one image": (
        lambda: make().fit((X[:1], Y[:1]), epochs=1, progress=False, cpu=True),
        ValueError,
        "last batch of train has one image",
    ),
    # files
    "weights missing": (lambda: load_model("resnet18", weights="no.safetensors"), FileNotFoundError, "does not exist"),
    "save path": (lambda: save_model(tiny_cnn(), "student.bin"), ValueError, "must end in '.safetensors'"),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_bad_input(case):
    run, error, message = CASES[case]
    with pytest.raises(error, match=message):
        run()


def test_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="one folder of images a class"):
        fit(tmp_path)


def test_weights_that_do_not_fit_or_are_not_weights(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"does not fit ResNet: .* missing \("):
        load_model("test_resnet", weights=tmp_path / "a.safetensors")
    save_model(tiny_cnn(num_classes=3), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"fc.weight has shape \(3, 96\) instead of \(1000, 96\)"):
        load_model("test_resnet", weights=tmp_path / "b.safetensors")
    for name in ("c.safetensors", "c.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match="read safely"):
            load_model("test_resnet", weights=tmp_path / name)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="read safely"):
        load_model("test_resnet", weights=tmp_path / "evil.pth")
    run = tmp_path / "run"
    torch.manual_seed(0)
    data, teacher = batch(16), tiny_vit()
    monkeypatch.setitem(globals(), "tiny_vit", lambda: teacher)
    fit(data, output_dir=run)
    for checkpoint in (run / "checkpoints").iterdir():
        torch.save({"x": Evil()}, checkpoint / "state.safetensors")
    with pytest.warns(RuntimeWarning, match="another checksum"), pytest.raises(ValueError, match="are damaged"):
        fit(data, output_dir=run, resume=True)
    for checkpoint in (run / "checkpoints").iterdir():  # with a checksum of its own it is no safetensors file still
        digest = hashlib.sha256((checkpoint / "state.safetensors").read_bytes()).hexdigest()
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "state.safetensors": digest}))
    with pytest.warns(RuntimeWarning, match="damaged"), pytest.raises(ValueError, match="are damaged"):
        fit(data, output_dir=run, resume=True)
    assert not (tmp_path / "pwned").exists()


def test_output_dir_of_another_run(tmp_path):
    fit(output_dir=tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds another run: go on with resume=True"):
        fit(output_dir=tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        fit(output_dir=tmp_path / "file")


def test_resume_with_other_settings(tmp_path):
    fit(output_dir=tmp_path, batch_size=8)
    with pytest.raises(ValueError, match=r"batch_size was 8 and is 4.*ema was None and is 0.9"):
        fit(output_dir=tmp_path, batch_size=4, ema=0.9, resume=True)


def test_nan_names_the_term_and_the_step_and_leaves_the_last_good_checkpoint(tmp_path):
    class Breaks(KD):
        calls = 0

        def forward(self, student, targets, labels=None):
            Breaks.calls += 1
            terms = super().forward(student, targets, labels)
            return {**terms, "kd": terms["kd"] * (math.nan if Breaks.calls == 3 else 1.0)}

    distiller = make(method=Breaks())
    with pytest.raises(TrainingDiverged, match=r"loss term 'kd' is nan at epoch 2, step 1.*last good checkpoint is in"):
        distiller.fit(batch(16), epochs=3, batch_size=8, output_dir=tmp_path / "run", progress=False, cpu=True)
    last = load_model("test_resnet", num_classes=10, weights=tmp_path / "run" / "last.safetensors")
    assert all(p.isfinite().all() for p in last.parameters())
