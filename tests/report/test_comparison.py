"""The page, table and picture of a comparison, from runs made up."""

import re

import pytest
from PIL import Image

from hetkd.report.comparison import draw_gains, make_table, mean_rows, method_rows, paired_gains, write_comparison

PROTOCOL = {"dataset": "photos", "train_images": 1200, "test_images": 300, "epochs": 3, "lr": 0.002, "precision": None}


def run(pair, method, seed, top1):
    costs = {"seconds": 10.0 + len(method), "images_per_second": 500.0, "peak_memory_mb": 900.0}
    about = {"pair": pair, "method": method, "seed": seed, "machine": "x86_64, 2 threads"}
    return {**about, "top1": top1, "curve": [top1 / 2, top1], "added_parameters": 1234, **costs}


ROWS = [
    *(run("vit:cnn", "ce", seed, 50.0 + seed) for seed in range(2)),
    *(run("vit:cnn", "sf<kd>", seed, 53.0 + 3 * seed) for seed in range(2)),
    run("mixer:cnn", "ce", 0, 40.0),
    run("mixer:cnn", "sf<kd>", 0, 41.0),
    run("mixer:cnn", "kd", 0, 39.0),
]


def of(pair):
    return [row for row in ROWS if row["pair"] == pair]


def test_gains_are_paired_by_seed_and_means_are_over_pairs():
    assert paired_gains(of("vit:cnn"), "sf<kd>") == [3.0, 5.0]
    assert method_rows(of("vit:cnn"))[1][:5] == ["sf<kd>", "2", "54.50", "2.12", "+4.00"]
    of_pairs = {pair: of(pair) for pair in ("vit:cnn", "mixer:cnn")}
    assert mean_rows(of_pairs) == [["ce", "45.25", "-"], ["sf<kd>", "47.75", "+2.50"]]


def test_table_has_every_pair_and_what_failed():
    table = make_table(ROWS, PROTOCOL, {("vit:cnn", "rsd"): "the loss is nan"})
    assert "## vit -> cnn" in table
    assert "| sf<kd> | 2 | 54.50 | 2.12 | +4.00 | 1,234 | 500 | 900 |" in table
    assert "|---|--:|--:|--:|--:|--:|--:|--:|" in table
    assert "- vit -> cnn, `rsd`: the loss is nan" in table


def test_page_is_of_one_file_and_escapes_what_it_shows(tmp_path):
    path = write_comparison(ROWS, PROTOCOL, {("vit:cnn", "rsd"): "<nan>"}, tmp_path / "report.html")
    page = path.read_text()
    assert "3 methods on photos" in page
    assert "sf&lt;kd&gt;" in page
    assert "&lt;nan&gt;" in page
    assert "<kd>" not in page
    assert page.count("<svg") == 6  # gains, curves and costs of two pairs
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert 'aria-label="Gains over ce. Top-1: sf' in page


def test_picture_of_gains(tmp_path, capsys):
    draw_gains(ROWS, tmp_path / "gains.png")
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.size[0] > 300
    draw_gains(ROWS[:2], tmp_path / "none.png")
    assert "gains need the method ce and another one" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[2:4]])
def test_page_of_few_runs(rows, tmp_path):
    assert "1 methods" in write_comparison(rows, PROTOCOL, {}, tmp_path / "report.html").read_text()
