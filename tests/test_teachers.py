"""Several teachers at once."""

import copy

import pytest
import torch
from conftest import batch, tiny_cnn, tiny_norm_free, tiny_vit
from torch import nn

from hetkd import (
    Distiller,
)


class TestSeveralTeachers:
    def teachers(self) -> list[nn.Module]:
        teachers = [tiny_vit(), tiny_cnn(num_classes=10)]
        for teacher in teachers:
            nn.init.normal_(teacher.get_classifier().weight)
        return teachers

    def test_each_teaches_by_a_copy_of_the_method(self):
        first, second = self.teachers()
        student = tiny_norm_free()
        options = {"teacher_weights": [0.25, 0.75], "temperature": 1, "input_size": 64}
        distiller = Distiller([first, second], student, "sfkd", **options)
        images, labels = batch()
        terms = distiller(images, labels).terms
        assert next(iter(terms)) == "ce"
        assert {name.split(".")[0] for name in terms} == {"ce", "teacher0", "teacher1"}
        for index, (teacher, weight) in enumerate(((first, 0.25), (second, 0.75))):
            alone = Distiller(teacher, copy.deepcopy(student), "kd", input_size=64, kd_weight=10)(images, labels)
            torch.testing.assert_close(terms[f"teacher{index}.kd"], weight * alone.terms["kd"])
        assert len(distiller.teachers) == 2
        assert distiller.plan.added_parameters == sum(row.added_parameters for row in distiller.plan.rows)
        assert "teacher1: " in str(distiller.plan)

    def test_each_has_its_own_input_transform(self):
        first, second = self.teachers()
        distiller = Distiller([first, second], tiny_norm_free(), "kd", input_size={"teacher": [32, 48], "student": 64})
        assert [tap.size for tap in distiller.taps.values()] == [(32, 32), (48, 48), (64, 64)]
        seen = []
        second.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        distiller(*batch())
        assert seen[0][-2:] == (48, 48)

    def test_joint_logits_are_the_mean_of_probabilities(self):
        first, second = self.teachers()
        distiller = Distiller([first, second], tiny_norm_free(), "kd", input_size=64).eval()
        images, labels = batch()
        each = [tap.run(images).logits.softmax(1) for tap in list(distiller.taps.values())[:2]]
        joint = distiller(images, labels).teacher_logits.softmax(1)
        torch.testing.assert_close(joint, (each[0] + each[1]) / 2)

    def test_teachers_are_no_part_of_what_is_trained_or_saved(self):
        distiller = Distiller(self.teachers(), tiny_norm_free(), ["kd", "rsd"], input_size=64)
        names = {name.split(".")[0] for name in distiller.state_dict()}
        assert names <= {"student", "method", "student_inputs"}
        assert all(not p.requires_grad for teacher in distiller.teachers for p in teacher.parameters())

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="1 entries for 2 teachers"):
            Distiller(self.teachers(), tiny_cnn(), "kd", teacher_weights=[1.0], input_size=32)
        with pytest.raises(ValueError, match="list of several teachers"):
            Distiller(tiny_vit(), tiny_cnn(), "kd", teacher_weights=[1.0], input_size=32)
        with pytest.raises(ValueError, match="2 teachers, but CE uses none"):
            Distiller(self.teachers(), tiny_cnn(), "ce", input_size=32)
        with pytest.raises(ValueError, match="3 sizes for 2 teachers"):
            Distiller(self.teachers(), tiny_cnn(), "kd", input_size={"teacher": [32, 32, 32]})
        with pytest.raises(ValueError, match="teacher1 has 7 classes"):
            Distiller([tiny_vit(), tiny_vit(num_classes=7)], tiny_cnn(), "kd", input_size=32)
        with pytest.raises(TypeError, match="belong in the method objects"):
            Distiller(tiny_vit(), tiny_cnn(), ["kd", "rsd"], temperature=2.0, input_size=32)
