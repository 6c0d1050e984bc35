"""The teacher's targets on disk: the same losses as live, and nothing but what they were made of."""

import copy
import json
import pickle

import pytest
import torch
from conftest import tiny_cnn, tiny_norm_free, tiny_vit
from torch import nn
from torchvision.transforms.functional import to_pil_image

from hetkd import Distiller
from hetkd.cache import records
from hetkd.cache.records import TeacherCache

QUIET = {"progress": False, "cpu": True}


@pytest.fixture
def folder(tmp_path) -> str:
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        path = tmp_path / "images" / f"class{index % 10}"
        path.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.rand(3, 40, 40, generator=generator)).save(path / f"{index:02}.png")
    return str(tmp_path / "images")


def make(method="sfkd", **options) -> Distiller:
    torch.manual_seed(0)
    teacher = tiny_vit()
    nn.init.normal_(teacher.head.weight, std=0.3)
    return Distiller(teacher, tiny_cnn(), method, input_size=32, **options)


def terms(result) -> list[dict]:
    return [{k: v for k, v in record.items() if k.startswith("train/")} for record in result.history]


@pytest.mark.parametrize("method", ["kd", "sfkd", "uhkd", "rsd", "crd", "ofa", ["dkd", "rkd"]])
def test_training_from_the_cache_has_the_losses_of_live_training(tmp_path, folder, method, capsys):
    live = make(method).fit(folder, epochs=2, batch_size=8, **QUIET)
    cached = make(method)
    cached.cache_teacher(folder, tmp_path / "cache", views=2, batch_size=5)
    out = capsys.readouterr().out
    cache = TeacherCache(tmp_path / "cache")
    assert f"{cache.dtype.itemsize:,} bytes an image and view" in out
    assert sum(path.stat().st_size for path in cache.path.glob("*.bin")) == 2 * 24 * cache.dtype.itemsize
    cached.teacher.forward_features = cached.teacher.forward_intermediates = None  # whoever runs it fails
    result = cached.fit(folder, epochs=2, batch_size=8, teacher_cache=tmp_path / "cache", **QUIET)
    for ours, theirs in zip(terms(result), terms(live), strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=5e-3, abs=5e-3), name


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", ["sfkd", "ofa", "rsd"])
def test_the_cache_alone_teaches_as_with_the_teacher_at_hand(tmp_path, folder, method, several):
    teacher, student = make().teacher, tiny_cnn()
    teachers = [teacher, copy.deepcopy(teacher)] if several else teacher

    def distiller(teachers) -> Distiller:
        torch.manual_seed(0)
        return Distiller(teachers, copy.deepcopy(student), method, input_size=32)

    whole, cache = distiller(teachers), tmp_path / "cache"
    whole.cache_teacher(folder, cache, progress=False)
    alone = distiller(f"cache:{cache}")
    assert list(alone.teachers) == []
    assert str(alone.plan) == str(whole.plan)
    assert terms(alone.fit(folder, epochs=1, batch_size=8, **QUIET)) == terms(
        whole.fit(folder, epochs=1, batch_size=8, teacher_cache=cache, **QUIET)
    )
    with pytest.raises(RuntimeError, match=r"only the cache .* is here: train with fit"):
        alone(torch.rand(2, 3, 32, 32))


def test_the_cache_alone_refuses_what_it_does_not_hold(tmp_path, folder):
    make().cache_teacher(folder, tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="stage of the cached teacher"):
        Distiller(f"cache:{tmp_path / 'cache'}", tiny_cnn(), "sfkd", stages=[("blocks.9", "layer4")], input_size=32)
    distiller = Distiller(f"cache:{tmp_path / 'cache'}", tiny_cnn(), "uhkd", keep=2, input_size=32)
    with pytest.raises(ValueError, match=r"holds stage blocks.0 .* with keep 4 instead of 2: .*maps=True"):
        distiller.fit(folder, epochs=1, **QUIET)
    with pytest.raises(ValueError, match="holds no cache"):
        Distiller("cache:nowhere", tiny_cnn(), "sfkd")
    with pytest.raises(ValueError, match="was made at 32 x 32: leave it out"):
        Distiller(f"cache:{tmp_path / 'cache'}", tiny_cnn(), "sfkd", input_size={"teacher": 64, "student": 32})


def same_as_live(folder, cache, method, student=None, **options) -> None:
    """Trains live, from the cache, and from the cache alone."""

    def distiller(teacher) -> Distiller:
        torch.manual_seed(0)
        own = tiny_cnn() if student is None else student()
        own.pretrained_cfg["interpolation"] = tiny_cnn().pretrained_cfg["interpolation"]  # the cache's images, live too
        return Distiller(teacher, own, method, input_size=32, **options)

    live = terms(distiller(make().teacher).fit(folder, epochs=1, batch_size=8, **QUIET))
    cached = terms(distiller(make().teacher).fit(folder, epochs=1, batch_size=8, teacher_cache=cache, **QUIET))
    alone = terms(distiller(f"cache:{cache}").fit(folder, epochs=1, batch_size=8, **QUIET))
    assert cached == alone
    for name, value in live[0].items():
        assert cached[0][name] == pytest.approx(value, rel=5e-3, abs=5e-3), name


def test_cached_logits_serve_every_method_on_logits(tmp_path, folder):
    make("kd").cache_teacher(folder, tmp_path / "kd", progress=False)
    make("sfkd").cache_teacher(folder, tmp_path / "sfkd", progress=False)
    for method in ("dkd", "dist", ["kd", "dkd"]):
        same_as_live(folder, tmp_path / "kd", method)
    same_as_live(folder, tmp_path / "sfkd", "dkd", student=tiny_norm_free)


@pytest.mark.parametrize(
    ("method", "options"),
    [("sfkd", {}), ("sfkd", {"reduction": "pca", "width": 8}), ("uhkd", {}), ("fitnet", {}), ("kd", {})],
)
def test_cached_maps_serve_every_method_and_student(tmp_path, folder, method, options):
    make("sfkd").cache_teacher(folder, tmp_path / "maps", maps=True, batch_size=7, progress=False)
    same_as_live(folder, tmp_path / "maps", method, student=tiny_norm_free, **options)


@pytest.mark.parametrize(
    ("recorded", "read"),
    [("sfkd", "uhkd"), ("uhkd", "sfkd"), ("crd", "rsd"), ("rsd", "rkd"), (["rsd", "sfkd"], "uhkd"), ("sfkd", "kd")],
)
def test_methods_read_each_others_targets(tmp_path, folder, recorded, read):
    make(recorded).cache_teacher(folder, tmp_path / "cache", progress=False)
    same_as_live(folder, tmp_path / "cache", read)


def test_students_of_other_sizes_and_kinds_read_one_cache(tmp_path, folder):
    make("sfkd").cache_teacher(folder, tmp_path / "cache", progress=False)
    same_as_live(folder, tmp_path / "cache", "sfkd", student=lambda: tiny_cnn(channels=(8, 16, 24, 32)))
    same_as_live(folder, tmp_path / "cache", "uhkd", student=tiny_norm_free)
    with pytest.raises(ValueError, match=r"grid \[2, 2\] instead of \[4, 4\].*maps=True"):
        same_as_live(folder, tmp_path / "cache", "uhkd", student=lambda: tiny_vit(embed_dim=16, num_heads=2))


def test_cached_maps_of_several_teachers(tmp_path, folder):
    def distiller(teachers, method) -> Distiller:
        torch.manual_seed(0)
        return Distiller(teachers, tiny_cnn(), method, input_size=32)

    teachers = [make().teacher, make().teacher.requires_grad_(False)]
    nn.init.normal_(teachers[1].head.weight)
    distiller(teachers, "sfkd").cache_teacher(folder, tmp_path / "maps", maps=True, progress=False)
    live = terms(distiller(teachers, "uhkd").fit(folder, epochs=1, batch_size=8, **QUIET))
    alone = terms(distiller(f"cache:{tmp_path / 'maps'}", "uhkd").fit(folder, epochs=1, batch_size=8, **QUIET))
    for name, value in live[0].items():
        assert alone[0][name] == pytest.approx(value, rel=5e-3, abs=5e-3), name


def test_maps_that_are_not_cached_are_refused(tmp_path, folder):
    make("sfkd", stages=[-1]).cache_teacher(folder, tmp_path / "maps", maps=True, progress=False)
    with pytest.raises(ValueError, match=r"holds no map of blocks\.\d+ \(it has blocks\.\d+\): .*maps=True"):
        make("uhkd").fit(folder, epochs=1, teacher_cache=tmp_path / "maps", **QUIET)
    make("kd").cache_teacher(folder, tmp_path / "logits", progress=False)
    with pytest.raises(ValueError, match=r"holds no map of blocks.0 \(it has no maps\).*maps=True"):
        make("uhkd").fit(folder, epochs=1, teacher_cache=tmp_path / "logits", **QUIET)


def test_tensors_and_few_logits(tmp_path):
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    distiller = make("kd")
    distiller.cache_teacher((images, labels), tmp_path / "cache", top_k=3, progress=False)
    cache = TeacherCache(tmp_path / "cache")
    record = {name: x.unsqueeze(0) for name, x in cache.record(0, 5, images[5]).items()}
    expected = distiller.eval()(images[5:6]).teacher_logits.softmax(1)
    untouched = TeacherCache(tmp_path / "cache")
    assert len(pickle.dumps(cache)) == len(pickle.dumps(untouched)), "a loading process opens files itself"
    found = cache.recorded(record)["logits"].softmax(1)
    top = expected.topk(3).indices
    torch.testing.assert_close(found.gather(1, top), expected.gather(1, top), rtol=2e-3, atol=1e-4)
    assert found.scatter(1, top, 0).sum().item() == pytest.approx(expected.scatter(1, top, 0).sum().item(), abs=1e-3)
    result = distiller.fit((images, labels), epochs=1, batch_size=8, teacher_cache=tmp_path / "cache", **QUIET)
    assert result.history[0]["train/kd"] > 0


def test_interrupted_it_goes_on(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(records, "SHARD_RECORDS", 10)
    whole, cut = make(), make()
    whole.cache_teacher(folder, tmp_path / "whole", views=2, progress=False)
    calls, encode = 0, cut.method.encode

    def power_cut(features):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(features)

    cut.method.encode = power_cut
    with pytest.raises(KeyboardInterrupt):
        cut.cache_teacher(folder, tmp_path / "cut", views=2, progress=False)
    with pytest.raises(ValueError, match="is not complete"):
        cut.fit(folder, epochs=1, batch_size=8, teacher_cache=tmp_path / "cut", **QUIET)
    cut.cache_teacher(folder, tmp_path / "cut", views=2, progress=False)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_what_does_not_fit_is_refused(tmp_path, folder):
    path = tmp_path / "cache"
    distiller = make()
    distiller.cache_teacher(folder, path, progress=False)

    def fit(distiller, data=folder, **options):
        distiller.fit(data, epochs=1, batch_size=8, teacher_cache=path, **QUIET, **options)

    other_teacher = make()
    nn.init.zeros_(other_teacher.teacher.head.bias).add_(1)
    with pytest.raises(ValueError, match="another teacher"):
        fit(other_teacher)
    with pytest.raises(ValueError, match="keep 4 instead of 1"):
        fit(make(keep=1))
    with pytest.raises(ValueError, match=r"with what 'low frequencies' instead of 'map'"):
        fit(make("fitnet", stages=[0]))
    with pytest.raises(ValueError, match=r"holds nothing of stage blocks\.3 .* \(it has blocks\.0"):
        fit(make(stages=[-1]))
    with pytest.raises(ValueError, match="another number of images"):
        fit(make(), (torch.rand(8, 3, 32, 32), torch.arange(8)))
    with pytest.raises(ValueError, match="another data set or input transform"):
        fit(make(), (torch.rand(24, 3, 32, 32), torch.arange(24) % 10))
    for options in ({"mixup": 0.2}, {"augment": lambda x: x}):
        with pytest.raises(ValueError, match="change images after that"):
            fit(make(), **options)
    with pytest.raises(TypeError, match="is a loader, whose images have no numbers"):
        fit(make(), torch.utils.data.DataLoader(torch.rand(8, 3, 32, 32), batch_size=4))
    with pytest.raises(ValueError, match="holds no cache"):
        make().fit(folder, epochs=1, teacher_cache=tmp_path / "nowhere", **QUIET)
    with pytest.raises(ValueError, match="holds another cache"):
        make("uhkd", keep=2).cache_teacher(folder, path, progress=False)
    with pytest.raises(ValueError, match="uses no teacher"):
        make("ce").cache_teacher(folder, path, progress=False)
    fit(make(feature_weight=3.0, kd_weight=0.5))  # weights change no target
    shard = next(path.glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is missing or damaged"):
        fit(make())
    distiller.cache_teacher(folder, path, progress=False)  # repairs it
    fit(make())
    with pytest.raises(ValueError, match="another data set or input transform"):
        Distiller(make().teacher, tiny_cnn(), "sfkd", input_size={"teacher": 32, "student": 64}).fit(
            folder, epochs=1, batch_size=8, teacher_cache=path, **QUIET
        )
    shard.unlink()
    with pytest.raises(ValueError, match="is missing or damaged"):
        fit(make())
    (path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        fit(make())


@pytest.mark.parametrize("several", [False, True])
def test_other_images_for_the_teacher_are_refused(tmp_path, several):
    torch.manual_seed(0)
    data = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    teacher = tiny_vit(dynamic_img_size=True)

    def made(pixels=32, **options) -> Distiller:
        teachers, sizes = ([teacher, copy.deepcopy(teacher)], [32, pixels]) if several else (teacher, pixels)
        return Distiller(teachers, tiny_cnn(), "kd", input_size={"teacher": sizes, "student": 32}, **options)

    made().cache_teacher(data, tmp_path / "cache", progress=False)
    options = {"epochs": 1, "batch_size": 8, "teacher_cache": tmp_path / "cache", **QUIET}
    with pytest.raises(ValueError, match=r"teacher1? size was \[32, 32\] and is \[48, 48\]"):
        made(48).fit(data, **options)
    with pytest.raises(ValueError, match="another size or normalisation of the images"):
        made(normalized=([0.5] * 3, [0.25] * 3)).fit(data, **options)
    made().fit(data, **options)


def test_a_cache_without_logits_is_refused_where_they_are_needed(tmp_path):
    data = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    make(kd_weight=0.0, stages=[0, 1, 2]).cache_teacher(data, tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="holds no logits"):
        make().fit(data, epochs=1, batch_size=8, teacher_cache=tmp_path / "cache", **QUIET)


def test_images_normalised_in_secret_are_not_cached(tmp_path):
    with pytest.raises(ValueError, match="say so with Distiller"):
        make().cache_teacher(torch.randn(16, 3, 32, 32), tmp_path / "cache", progress=False)


def test_a_cache_goes_on_with_the_basis_it_began_with(tmp_path):
    images = torch.rand(24, 3, 32, 32)
    for name, again in (("whole", 4), ("cut", 16)):
        make(reduction="pca", width=8).cache_teacher(images, tmp_path / name, views=2, batch_size=4, progress=False)
        (tmp_path / name / "view001-00000.bin").unlink()
        make(reduction="pca", width=8).cache_teacher(images, tmp_path / name, views=2, batch_size=again, progress=False)
    of_whole, of_cut = (TeacherCache(tmp_path / name) for name in ("whole", "cut"))
    for index in range(24):
        ours, theirs = of_cut.record(1, index, images[index]), of_whole.record(1, index, images[index])
        torch.testing.assert_close(ours["stage0"], theirs["stage0"], atol=2e-3, rtol=0)


def test_images_that_cannot_be_read_are_counted_from_the_cache_too(tmp_path, folder):
    (tmp_path / "images" / "class3" / "03.png").write_bytes(b"no picture")
    make().cache_teacher(folder, tmp_path / "cache", unreadable="skip", progress=False)
    options = {"batch_size": 8, "teacher_cache": tmp_path / "cache", "unreadable": "skip"}
    result = make().fit(folder, epochs=1, **options, **QUIET)
    assert result.history[0]["unreadable_images"] == 1


def test_a_single_other_image_is_noticed(tmp_path):
    images, labels = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    make("kd").cache_teacher((images, labels), tmp_path / "cache", progress=False)
    other = images.clone()
    other[3] = 0  # not one of those that the fingerprint looks at
    with pytest.raises(ValueError, match="image 3 is not what the teacher saw"):
        make("kd").fit((other, labels), epochs=1, batch_size=8, teacher_cache=tmp_path / "cache", **QUIET)


def test_a_fitted_reduction_is_that_of_the_first_batch(tmp_path):
    images, labels = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    distiller = make("sfkd", reduction="pca", width=8)
    live = make("sfkd", reduction="pca", width=8)
    live.method.encode(live.taps["teacher"].run(images[:16]))
    distiller.cache_teacher((images, labels), tmp_path / "cache", batch_size=16, progress=False)
    torch.testing.assert_close(distiller.method.reduce[0].basis, live.method.reduce[0].basis)


def test_resume_from_a_cache_is_exact(tmp_path, folder):
    make().cache_teacher(folder, tmp_path / "cache", views=2, progress=False)
    options = {**QUIET, "epochs": 3, "batch_size": 8, "teacher_cache": tmp_path / "cache", "checkpoint_steps": 1}
    whole = make()
    whole.fit(folder, **options, output_dir=tmp_path / "whole")
    stopped, calls = make(), 0
    forward = stopped.method.forward

    def stop(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return forward(*args)

    stopped.method.forward = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(folder, **options, output_dir=tmp_path / "cut")
    resumed = make()
    resumed.fit(folder, **options, output_dir=tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_several_teachers_and_no_labels(tmp_path, folder):
    torch.manual_seed(0)
    teachers = [tiny_vit(), tiny_cnn()]
    images = torch.rand(16, 3, 32, 32)

    def make_two() -> Distiller:
        torch.manual_seed(1)
        pair = copy.deepcopy(teachers)
        return Distiller(pair, tiny_cnn(), "rsd", ce_weight=0, input_size={"teacher": [32, 32], "student": 32})

    distiller = make_two()
    distiller.cache_teacher(images, tmp_path / "cache", progress=False)
    assert len(json.loads((tmp_path / "cache" / "index.json").read_text())["teacher"]) == 2
    cached = make_two().fit(images, epochs=1, batch_size=8, teacher_cache=tmp_path / "cache", **QUIET)
    live = make_two().fit(images, epochs=1, batch_size=8, **QUIET)
    for name, value in terms(live)[0].items():
        assert terms(cached)[0][name] == pytest.approx(value, rel=5e-3, abs=5e-3)
