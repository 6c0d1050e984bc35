"""Segmentation: what labels, losses and metrics are, against formulas and counts by hand."""

import pytest
import torch
import torch.nn.functional as F

from hetkd import CWD, KD, Segmentation
from hetkd.data.images import TensorImages
from hetkd.features import Features
from hetkd.tasks import Classification, make_task
from hetkd.tasks.segmentation import in_strips, resized

CPU = torch.device("cpu")


def masks(*shape, classes=3):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(0))


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_task(method):
    method.task = Segmentation()
    return method


def test_cross_entropy_is_that_of_each_valid_pixel():
    logits, labels = maps(2, 3, 4, 5), masks(2, 4, 5)
    labels[0, 0] = 255
    by_hand = [
        -logits[b, :, y, x].log_softmax(0)[labels[b, y, x]]
        for b in range(2)
        for y in range(4)
        for x in range(5)
        if labels[b, y, x] != 255
    ]
    torch.testing.assert_close(Segmentation().cross_entropy(logits, labels, None), torch.stack(by_hand).mean())


def test_cross_entropy_enlarges_logits_to_the_mask():
    logits, labels = maps(1, 3, 4, 5), masks(1, 9, 11)
    enlarged = F.interpolate(logits, (9, 11), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Segmentation().cross_entropy(logits, labels, None), F.cross_entropy(enlarged, labels))


def test_kd_is_the_mean_over_valid_pixels():
    student, teacher, labels = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1), masks(2, 4, 5)
    labels[1] = 255
    method = of_task(KD(temperature=4.0, ce_weight=0))
    found = method(Features(student, ()), {"logits": teacher}, labels)["kd"]
    p, q = (x[0].movedim(0, -1).flatten(0, 1) / 4 for x in (teacher, student))
    by_hand = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean() * 16
    torch.testing.assert_close(found, by_hand)


def test_logits_meet_on_the_coarser_grid():
    rows = Segmentation().compared_logits(maps(1, 3, 8, 8), maps(1, 3, 4, 6), None)
    assert rows.student.shape == rows.teacher.shape == (24, 3)
    torch.testing.assert_close(rows.teacher, maps(1, 3, 4, 6).movedim(1, -1).flatten(0, 2))


def test_cwd_is_the_formula():
    student, teacher = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    found = of_task(CWD(ce_weight=0))(Features(student, ()), {"logits": teacher}, None)["cwd"]
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for c in range(3):
            p, q = ((x[b, c] / 4).flatten().softmax(0) for x in (teacher, student))
            total += (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(found, 3 * 16 * total / (2 * 3))


def test_metrics_are_those_counted_by_hand():
    task, names = Segmentation(ignore_index=9), ["a", "b", "c"]
    labels = torch.tensor([[[0, 0, 1], [1, 9, 0]]])
    named = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    logits = F.one_hot(named, 3).movedim(-1, 1).double() * 5
    metrics = task.metrics(names, CPU, sync=False)
    metrics.update(*task.statistics(logits, labels))
    found = metrics.compute()
    # a: 2 right of 3 true, 0 falsely named; b: 2 right of 2, 1 falsely named; c never occurs
    assert found["iou/a"] == pytest.approx(100 * 2 / 3)
    assert found["iou/b"] == pytest.approx(100 * 2 / 3)
    assert "iou/c" not in found
    assert found["miou"] == pytest.approx(100 * 2 / 3)
    assert found["pixel_accuracy"] == pytest.approx(80)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels, ignore_index=9).item())


def test_metrics_of_masks_of_several_sizes_are_those_of_each_alone():
    task, logits = Segmentation(), maps(2, 3, 4, 4)
    sizes = [masks(8, 8), masks(5, 9)]
    together, apart = (task.metrics(["a", "b", "c"], CPU, sync=False) for _ in range(2))
    together.update(*task.statistics(logits, sizes))
    for index, mask in enumerate(sizes):
        apart.update(*task.statistics(logits[index : index + 1], mask[None]))
    assert together.compute() == apart.compute()


def test_teachers_logits_are_kept_small():
    big = maps(1, 3, 240, 320)
    assert Segmentation().compact(big).shape == (1, 3, 96, 128)
    assert Segmentation().compact(big[:, :, :100, :128]).shape == (1, 3, 100, 128)


def test_resized_averages_where_either_side_shrinks():
    x = maps(1, 2, 64, 32)
    expected = F.interpolate(x, (16, 32), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(resized(x, (16, 32)), expected)


def test_resized_leaves_equal_sizes_alone():
    x = maps(1, 3, 4, 4)
    assert resized(x, (4, 4)) is x


LABELS = {
    "dtype": (torch.zeros(2, 8, 8, dtype=torch.int32), TypeError, r"masks.long\(\)"),
    "no tensor": ([1], TypeError, "masks must be a tensor"),
    "rank": (torch.zeros(2, dtype=torch.int64), ValueError, r"give \[B, H, W\]"),
    "size": (torch.zeros(2, 8, 9, dtype=torch.int64), ValueError, "masks have 9 x 8 pixels, images 8 x 8"),
    "range": (torch.full((2, 8, 8), 3), ValueError, "masks range from 3 to 3, but the student has 3 classes"),
}


@pytest.mark.parametrize("name", LABELS)
def test_bad_masks(name):
    labels, error, message = LABELS[name]
    with pytest.raises(error, match=message):
        Segmentation().check_labels(labels, torch.zeros(2, 3, 8, 8), 3, look_at_values=True)


def test_bad_tasks():
    with pytest.raises(ValueError, match="ignore_index"):
        Segmentation(ignore_index=1.5)
    with pytest.raises(ValueError, match="three numbers for each class"):
        Segmentation(colors=[(1, 2)])
    with pytest.raises(ValueError, match="load_model"):
        make_task("segmentation", is_dense=False)
    assert isinstance(make_task(None, is_dense=False), Classification)


@pytest.mark.parametrize("option", ["mixup", "cutmix", "label_smoothing", "augment", "balanced_sampling", "report"])
def test_options_without_meaning_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=.* is not for segmentation"):
        Segmentation().refuse_options({option: 0.5})


def test_large_masks_are_measured_strip_by_strip_alike(monkeypatch):
    task, logits, mask = Segmentation(), maps(2, 3, 4, 5).float(), masks(2, 37, 23)
    whole = task.statistics(logits, mask)
    monkeypatch.setattr("hetkd.tasks.segmentation._MOST_AT_ONCE", 3 * 23 * 5)
    assert [len(strip[0]) for _, strip in in_strips(logits[:1], mask[:1])] == [5] * 7 + [2]
    strips = task.statistics(logits, mask)
    assert torch.equal(strips[0], whole[0])
    torch.testing.assert_close(strips[1], whole[1])


def test_classes_are_counted_in_pixels():
    mask = torch.tensor([[[0, 0, 1], [255, 2, 0]]])
    data = TensorImages(torch.rand(1, 3, 2, 3), mask)
    assert Segmentation().class_counts(data, 4).tolist() == [3, 1, 1, 0]


def test_strips_are_float32_under_autocast_and_views_where_sizes_agree(monkeypatch):
    monkeypatch.setattr("hetkd.tasks.segmentation._MOST_AT_ONCE", 100)
    logits, mask = maps(1, 3, 4, 5).float(), masks(1, 16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        strips = [strip for strip, _ in in_strips(logits, mask)]
    torch.testing.assert_close(torch.cat(strips, 2), resized(logits, (16, 20)))
    same = maps(1, 3, 16, 20).float()
    parts = [strip for strip, _ in in_strips(same, mask)]
    assert torch.equal(torch.cat(parts, 2), same)
    assert parts[0].data_ptr() == same.data_ptr()


def test_masks_that_are_counted_are_checked():
    data = TensorImages(torch.rand(1, 3, 2, 2), torch.tensor([[[0, 77], [1, 2]]]))
    with pytest.raises(ValueError, match="masks range from 0 to 77, but the student has 3 classes"):
        Segmentation().class_counts(data, 3)
