"""Methods added up."""

import copy

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_vit
from torch import nn

from hetkd import (
    KD,
    SFKD,
    UHKD,
    Combined,
    Distiller,
)


class TestCombined:
    def test_terms_add_up_and_what_is_common_counts_once(self):
        teacher, student = tiny_vit(), tiny_cnn()
        nn.init.normal_(teacher.head.weight)
        distiller = Distiller(teacher, student, ["kd", SFKD(temperature=1), "rsd"], input_size=32)
        images, labels = batch()
        output = distiller(images, labels)
        assert list(output.terms)[:2] == ["ce", "kd"]
        assert [name.split(".")[0] for name in output.terms] == ["ce", "kd", *["sfkd"] * 3, "rsd"]
        alone = Distiller(teacher, copy.deepcopy(student), "kd", input_size=32, kd_weight=10)(images, labels)
        torch.testing.assert_close(output.terms["ce"], alone.terms["ce"])
        torch.testing.assert_close(output.terms["kd"], alone.terms["kd"])
        assert distiller.plan.title.endswith("method KD + SFKD + RSD")
        assert distiller.plan.added_parameters == sum(row.added_parameters for row in distiller.plan.rows)

    def test_weights_scale_the_terms(self):
        torch.manual_seed(0)
        plain = Distiller(tiny_vit(), tiny_cnn(), Combined(["dist", "rkd"]), input_size=32)
        torch.manual_seed(0)
        weighted = Distiller(tiny_vit(), tiny_cnn(), Combined(["dist", "rkd"], weights=[2, 0.5]), input_size=32)
        images, labels = batch()
        first, second = plain(images, labels).terms, weighted(images, labels).terms
        torch.testing.assert_close(second["ce"], first["ce"])
        torch.testing.assert_close(second["dist"], 2 * first["dist"])
        torch.testing.assert_close(second["rkd.pooled"], 0.5 * first["rkd.pooled"])

    def test_methods_of_the_user_are_left_as_they_were(self):
        kd, sfkd = KD(temperature=4), SFKD()
        Distiller(tiny_vit(), tiny_cnn(), [kd, sfkd], input_size=32)
        assert (kd.kd_weight, sfkd.kd_weight, sfkd.ce_weight) == (1, 10, 1)
        assert sfkd.pairs is None
        with pytest.raises(ValueError, match="serves another Distiller"):
            Combined([Distiller(tiny_vit(), tiny_cnn(), kd, input_size=32).method, "rsd"])

    def test_logit_losses_of_ones_own_stay_themselves(self):
        class Own(KD):
            def logit_loss(self, student, teacher, labels):
                return student.logits.sum() * 0 + 12345

        terms = Distiller(tiny_vit(), tiny_cnn(), [Own(), "rsd"], input_size=32)(*batch()).terms
        assert terms["kd"].item() == 12345
        with pytest.raises(ValueError, match="two methods have a term 'kd'"):
            Distiller(tiny_vit(), tiny_cnn(), [Own(), Combined([KD(), "at"])], input_size=32)(*batch())

    def test_stages_of_the_user_are_those_of_all_parts(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), ["uhkd", "fitnet", "dkd"], stages=[-1], input_size=32)
        assert [name for name in distiller(*batch()).terms if "." in name] == [
            f"uhkd.{distiller.plan.rows[0].student}",
            f"fitnet.{distiller.plan.rows[0].student}",
        ]

    def test_targets_serve_all_parts_and_need_no_images(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), ["ofa", UHKD(), "fitnet"], input_size=32).eval()
        images, labels = batch()
        output = distiller(images, labels)
        with torch.no_grad():
            targets = distiller.method.encode(distiller.taps["teacher"].run(images))
            terms = distiller.method(distiller.taps["student"].run(images), targets, labels)
        for name, term in terms.items():
            torch.testing.assert_close(term, output.terms[name])

    @pytest.mark.parametrize(
        ("methods", "weights", "message"),
        [
            ([], None, "no methods"),
            (["kd", "kd"], None, "KD more than once"),
            (["kd", "sfkd"], None, "KD .T = 1., SFKD .T = 4."),
            (["kd", "rsd"], [1], "1 entries for 2 methods"),
            (["kd", "rsd"], [1, -1], "weights=-1"),
            (["kd", "rds"], None, "'rsd'"),
        ],
    )
    def test_bad_combinations_are_refused(self, methods, weights, message):
        with pytest.raises(ValueError, match=message):
            Combined(methods, weights)

    def test_it_trains(self, tmp_path):
        distiller = Distiller(tiny_vit(), tiny_cnn(), ["kd", "crd"], input_size=32)
        data = (torch.rand(16, 3, 32, 32), torch.arange(16) % 10)
        result = distiller.fit(data, data, epochs=1, batch_size=8, output_dir=tmp_path / "run", progress=False)
        assert {"train/ce", "train/kd", "train/crd.pooled"} <= set(result.history[0])
