"""The field's baselines: each loss against an independent computation in float64, hand-computed cases, known limits."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import PAIRS, STUDENT_STAGES, TEACHER_STAGES, batch, features, tiny_cnn, tiny_norm_free, tiny_vit
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from hetkd import (
    AT,
    CC,
    CRD,
    DIST,
    DKD,
    KD,
    OFA,
    RKD,
    RSD,
    SFKD,
    UHKD,
    Combined,
    DeiT,
    Distiller,
    Features,
    FitNet,
    Stage,
    StagePair,
    list_methods,
)
from hetkd.methods.cc import CC as CorrelationCongruence
from hetkd.methods.common.statistics import standardize_batch
from hetkd.methods.crd import Memory
from hetkd.methods.dkd import decoupled_parts
from hetkd.methods.ofa import convolutional_exit, enhanced_loss, token_exit
from hetkd.methods.rkd import angles, distances
from hetkd.methods.rsd import redundancy

EVERY = ["at", "cc", "ce", "crd", "deit", "dist", "dkd", "fitnet", "kd", "ofa", "rkd", "rsd", "sfkd", "uhkd"]
VECTORS = [StagePair(Stage("pooled", 40, 1, 1), Stage("pooled", 32, 1, 1))]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def logits_only(logits: torch.Tensor) -> Features:
    return Features(logits, ())


def vectors(size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 32), torch.randn(size, 40)


def compared(method, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None) -> float:
    """Returns the loss of a method on vectors, without its weight."""
    if method.pairs is None:
        method.bind([StagePair(Stage("t", teacher.shape[1], 1, 1), Stage("s", student.shape[1], 1, 1))])
    return method.compare(0, student[:, :, None, None], teacher, labels)


def test_all_methods_are_listed():
    assert [name for name in list_methods() if not name.startswith("test-")] == EVERY


class TestDKD:
    student, teacher = torch.randn(5, 7), 2 * torch.randn(5, 7)
    labels = torch.tensor([0, 3, 6, 3, 1])

    def test_parts_equal_the_paper_in_float64(self):
        s, t = softmax(self.student.double().numpy()), softmax(self.teacher.double().numpy())
        target, others = decoupled_parts(self.student.double(), self.teacher.double(), self.labels)
        for row, y in enumerate(self.labels.tolist()):
            binary = t[row, y] * math.log(t[row, y] / s[row, y]) + (1 - t[row, y]) * math.log(
                (1 - t[row, y]) / (1 - s[row, y])
            )
            t_hat, s_hat = np.delete(t[row], y) / (1 - t[row, y]), np.delete(s[row], y) / (1 - s[row, y])
            assert target[row].item() == pytest.approx(binary, rel=1e-9)
            assert others[row].item() == pytest.approx((t_hat * np.log(t_hat / s_hat)).sum(), rel=1e-9)

    def test_parts_add_up_to_kd(self):
        target, others = decoupled_parts(self.student, self.teacher, self.labels)
        confidence = self.teacher.softmax(1)[range(5), self.labels]
        kd = KD().logit_loss(logits_only(self.student), self.teacher, None)
        torch.testing.assert_close((target + (1 - confidence) * others).mean(), kd)

    def test_is_zero_for_equal_logits_and_weighs_its_parts(self):
        equal = DKD().logit_loss(logits_only(self.teacher), self.teacher, self.labels)
        assert equal.item() == pytest.approx(0, abs=1e-6)
        target, others = decoupled_parts(self.student / 2, self.teacher / 2, self.labels)
        loss = DKD(alpha=0.5, beta=8, temperature=2).logit_loss(logits_only(self.student), self.teacher, self.labels)
        torch.testing.assert_close(loss, 4 * (0.5 * target.mean() + 8 * others.mean()))

    def test_without_labels_the_teachers_class_stands_in(self):
        student = logits_only(self.student)
        by_teacher = DKD().logit_loss(student, self.teacher, self.teacher.argmax(1))
        torch.testing.assert_close(DKD().logit_loss(student, self.teacher, None), by_teacher)
        soft = F.one_hot(self.labels, 7) * 0.9 + 0.1 / 7
        by_labels = DKD().logit_loss(student, self.teacher, self.labels)
        torch.testing.assert_close(DKD().logit_loss(student, self.teacher, soft), by_labels)

    def test_extreme_logits_stay_finite(self):
        sure = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
        loss = DKD().logit_loss(logits_only(sure), -sure.detach(), torch.tensor([0]))
        loss.backward()
        assert loss.isfinite()
        assert sure.grad.isfinite().all()


class TestDIST:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)

    def test_equals_numpy_in_float64(self):
        s, t = softmax(self.student.double().numpy() / 2), softmax(self.teacher.double().numpy() / 2)
        inter = np.mean([1 - np.corrcoef(s[row], t[row])[0, 1] for row in range(6)])
        intra = np.mean([1 - np.corrcoef(s[:, column], t[:, column])[0, 1] for column in range(5)])
        method = DIST(beta=2.0, gamma=3.0, temperature=2.0)
        loss = method.logit_loss(logits_only(self.student.double()), self.teacher.double(), None)
        assert loss.item() == pytest.approx(4 * (2 * inter + 3 * intra), rel=1e-5)

    def test_by_logits_it_is_invariant_to_scale_and_shift_of_the_students(self):
        method = DIST(scores="logits")
        loss = method.logit_loss(logits_only(self.student), self.teacher, None)
        moved = method.logit_loss(logits_only(7 * self.student - 3), self.teacher, None)
        torch.testing.assert_close(moved, loss)
        assert method.logit_loss(logits_only(5 * self.teacher + 1), self.teacher, None).abs() < 1e-6

    def test_by_probabilities_it_is_invariant_to_shift(self):
        loss = DIST().logit_loss(logits_only(self.student), self.teacher, None)
        torch.testing.assert_close(DIST().logit_loss(logits_only(self.student + 4), self.teacher, None), loss)
        assert DIST().logit_loss(logits_only(self.teacher), self.teacher, None).abs() < 1e-6


class TestDeiT:
    def test_is_half_labels_and_half_the_teachers_decisions(self):
        student, teacher, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1, 0, 5, 2])
        method = DeiT()
        method.bind([])
        terms = method(logits_only(student), {"logits": teacher}, labels)
        assert terms["ce"].item() == pytest.approx(0.5 * F.cross_entropy(student, labels).item())
        assert terms["hard"].item() == pytest.approx(0.5 * F.cross_entropy(student, teacher.argmax(1)).item())

    def test_hugging_face_student_with_a_distillation_token(self):
        from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

        config = DeiTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=10,
        )
        student = DeiTForImageClassificationWithTeacher(config)
        distiller = Distiller(tiny_cnn(), student, "deit", input_size=32).train()
        images, labels = batch()
        terms = distiller(images, labels).terms
        output = student(distiller.student_inputs(images))
        expected = 0.5 * F.cross_entropy(output.cls_logits, labels)
        torch.testing.assert_close(terms["ce"], expected)
        terms["hard"].backward()
        assert student.cls_classifier.weight.grad is None

    def test_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(self):
        student = timm.create_model(
            "deit_tiny_distilled_patch16_224",
            num_classes=10,
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
        )
        distiller = Distiller(tiny_cnn(), student, "deit", input_size=32)
        images, labels = batch()
        output = distiller(images, labels)
        output.terms["hard"].backward()
        assert student.head_dist.weight.grad.abs().sum() > 0
        assert student.head.weight.grad is None
        distiller(images, labels).terms["ce"].backward()
        assert student.head.weight.grad.abs().sum() > 0
        assert not student.distilled_training  # as it was
        student.eval()
        inputs = distiller.student_inputs(images)
        torch.testing.assert_close(distiller.predict(images), student(inputs))


class TestFitNetAndAT:
    def test_fitnet_is_the_mean_squared_error_of_projected_maps(self):
        method = FitNet()
        method.bind([StagePair(Stage("t", 5, 4, 4), Stage("s", 3, 4, 4))])
        x, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
        weight = method.project[0].weight[:, :, 0, 0].detach().double().numpy()
        projected = np.einsum("dc,bchw->bdhw", weight, x.double().numpy())
        expected = np.mean((projected - t.double().numpy()) ** 2)
        loss = method.compare(0, x, method.encode_stage(0, t), None)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_at_by_hand(self):
        method = AT(feature_weight=1000)
        method.bind([StagePair(Stage("t", 2, 1, 2), Stage("s", 1, 1, 2))])
        teacher = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]])  # mean squares 5, 2
        student = torch.tensor([[[[0.0, 2.0]]]])  # 0, 4: normalised 0, 1
        length = math.hypot(5, 2)
        expected = ((5 / length) ** 2 + (1 - 2 / length) ** 2) / 2
        terms = method(Features(None, (student,)), method.encode(Features(None, (teacher,))))
        assert terms["at.s"].item() == pytest.approx(1000 * expected, rel=1e-5)

    def test_at_ignores_channels_and_scale_and_meets_on_a_common_grid(self):
        method = AT()
        method.bind(PAIRS)
        x = features(STUDENT_STAGES)
        terms = method(Features(None, x.maps), method.encode(features(TEACHER_STAGES)))
        scaled = Features(None, tuple(5 * x.flip(1) for x in x.maps))
        torch.manual_seed(0)
        same = AT()
        same.bind([StagePair(s, s) for s in STUDENT_STAGES])
        assert all(term < 1e-6 for term in same(scaled, same.encode(Features(None, x.maps))).values())
        assert all(term > 0.01 for term in terms.values())

    def test_at_refuses_a_grid_of_one_pixel_and_skips_it_by_itself(self):
        one = StagePair(Stage("t", 8, 1, 1), Stage("s", 4, 2, 2))
        with pytest.raises(ValueError, match="one pixel"):
            AT().bind([one])
        assert AT().automatic_pairs([*PAIRS, one], None) == PAIRS


class TestCC:
    def test_neighbours_by_hand(self):
        method = CC(width=2)
        student, teacher = torch.tensor([[1.0, 2.0], [0.0, 1.0], [4.0, 0.0]]), torch.zeros(3, 1)
        compared(method, student, teacher)
        for embed in (method.embed_student[0], method.embed_teacher[0]):
            nn.init.zeros_(embed.bias)
        nn.init.eye_(method.embed_student[0].weight)
        # neighbouring errors: (1, 2) . (0, 1) = 2 and (0, 1) . (4, 0) = 0
        assert compared(method, student, teacher).item() == pytest.approx(1.0)

    def test_kernel_approximates_the_gaussian_one_and_equals_the_paper(self):
        method = CorrelationCongruence(form="kernel", order=12)
        x, y = (torch.randn(6, 9, dtype=torch.float64) for _ in range(2))
        units = [(z / z.norm(dim=1, keepdim=True)).numpy() for z in (x, y)]
        gaussian = [np.exp(-0.4 * ((u[:, None] - u[None]) ** 2).sum(-1)) for u in units]
        expected = ((gaussian[0] - gaussian[1]) ** 2).sum() / 36
        assert compared(method, x, y).item() == pytest.approx(expected, rel=1e-6)
        second_order = CorrelationCongruence(form="kernel")
        taylor = [math.exp(-0.8) * (1 + 0.8 * u @ u.T + (0.8 * u @ u.T) ** 2 / 2) for u in units]
        assert compared(second_order, x, y).item() == pytest.approx(((taylor[0] - taylor[1]) ** 2).mean(), rel=1e-9)
        assert sum(p.numel() for p in second_order.parameters()) == 0


class TestRKD:
    def test_distances_and_angles_by_hand(self):
        x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        expected = torch.tensor([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 4
        torch.testing.assert_close(distances(x), expected)
        cosines = angles(x)
        assert cosines[0, 1, 2].item() == pytest.approx(0.0, abs=1e-7)
        assert cosines[1, 0, 2].item() == pytest.approx(0.6)
        assert cosines[2, 0, 1].item() == pytest.approx(0.8)

    def test_equals_loops_in_float64(self):
        x, y = (torch.randn(5, width, dtype=torch.float64) for width in (3, 4))

        def huber(difference: float) -> float:
            return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5

        def relations(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.array([[np.linalg.norm(a - b) for b in z] for a in z])
            unit = np.array([[(a - b) / max(np.linalg.norm(a - b), 1e-12) for a in z] for b in z])
            return lengths / lengths[lengths > 0].mean(), np.einsum("jid,jkd->jik", unit, unit)

        (d_x, a_x), (d_y, a_y) = relations(x.numpy()), relations(y.numpy())
        expected = 25 * np.mean([huber(e) for e in (d_x - d_y).flat]) + 50 * np.mean(
            [huber(e) for e in (a_x - a_y).flat]
        )
        assert compared(RKD(), x, y).item() == pytest.approx(expected, rel=1e-9)

    def test_ignores_rotation_shift_and_scale_and_has_finite_gradients(self):
        x = torch.randn(6, 4)
        rotation = torch.linalg.qr(torch.randn(4, 4))[0]
        assert compared(RKD(), 3 * x @ rotation + 1, x).abs() < 1e-8
        twice = torch.cat([x[:1], x]).requires_grad_()  # two equal images
        compared(RKD(), twice, torch.randn(7, 5)).backward()
        assert twice.grad.isfinite().all()


class TestRSD:
    def test_equals_numpy_in_float64(self):
        s, t = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
        cross = np.corrcoef(t.numpy().T, s.numpy().T)[:4, 4:]
        on = ((1 - np.diag(cross)) ** 2).sum()
        off = (cross**2).sum() - (np.diag(cross) ** 2).sum()
        assert redundancy(s, t, 0.01).item() == pytest.approx(on + 0.01 * off, rel=1e-6)

    def test_minimum_is_the_identity_correlation(self):
        white = torch.linalg.qr(standardize_batch(torch.randn(16, 5)))[0]
        white = white - white.mean(0)
        white = torch.linalg.qr(white)[0]  # uncorrelated dimensions
        assert redundancy(3 * white + 1, white, 0.01).abs() < 1e-5
        free = torch.randn(16, 5, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(1000):
            optimizer.zero_grad()
            loss = redundancy(free, white, 0.01)
            loss.backward()
            optimizer.step()
        cross = standardize_batch(white).T @ standardize_batch(free.detach()) / 16
        torch.testing.assert_close(cross, torch.eye(5), atol=0.02, rtol=0)

    def test_projector_is_the_papers(self):
        method = RSD()
        method.bind(VECTORS)
        assert [type(layer) for layer in method.project[0]] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
        assert method.project[0][0].out_features == 64
        assert method.project[0][3].out_features == 40


class TestOFA:
    def test_loss_equals_the_paper_in_float64(self):
        s, t, labels = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 2, 4, 4])
        p_s, p_t, y = softmax(s.numpy()), softmax(t.numpy()), np.eye(5)[labels.numpy()]
        expected = np.mean((-((p_t + y) ** 1.4 - y) * np.log(p_s)).sum(1))
        assert enhanced_loss(s, t, labels, 1.4).item() == pytest.approx(expected, rel=1e-9)

    def test_with_gamma_1_it_is_the_cross_entropy_with_the_teacher(self):
        s, t = torch.randn(4, 5), torch.randn(4, 5)
        loss = enhanced_loss(s, t, torch.tensor([0, 2, 4, 4]), 1.0)
        torch.testing.assert_close(loss, F.cross_entropy(s, t.softmax(1)))

    def test_exits_of_shrinking_and_of_isotropic_students(self):
        shrinking = [Stage(f"s{i}", 8 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
        for index, stage in enumerate(shrinking):
            branch = convolutional_exit(stage, 3 - index, 96, 10)
            assert branch(torch.randn(2, stage.channels, *stage.grid)).shape == (2, 10)
        isotropic = [Stage(f"blocks.{i}", 24, 4, 4) for i in range(4)]
        blocks = [token_exit(stage, 3 - i, 10) for i, stage in enumerate(isotropic)]
        assert [len(branch[0].blocks) for branch in blocks] == [3, 2, 1, 1]
        assert all(branch(torch.randn(2, 24, 4, 4)).shape == (2, 10) for branch in blocks)

    def test_exits_are_as_large_as_the_authors(self):
        student = timm.create_model("deit_tiny_patch16_224")
        added = Distiller(timm.create_model("convnext_atto"), student, "ofa").plan.added_parameters
        assert added == pytest.approx(4.5e6, rel=0.02)  # published for DeiT-T, with 1,000 classes

    def test_teacher_maps_are_not_taken(self):
        distiller = Distiller(tiny_vit(), tiny_cnn(), "ofa", input_size=32)
        assert distiller.taps["teacher"].names == []
        assert [row.teacher for row in distiller.plan.rows] == ["logits"] * 4 + [""]


class TestCRD:
    def test_first_step_equals_loops_in_float64(self):
        memory = Memory(8, 3, 0.5).train()
        student, teacher = (F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1) for _ in range(2))
        labels = torch.tensor([0, 1, 0, 2])
        u_s = np.exp((student @ teacher.T).numpy() / 0.5)
        u_t = u_s.T / u_s.mean()
        u_s = u_s / u_s.mean()
        expected = 0.0
        for u in (u_s, u_t):
            for b in range(4):
                others = [j for j in range(4) if labels[j] != labels[b]]
                n = len(others)
                expected -= math.log(u[b, b] / (u[b, b] + n)) / 4
                expected -= sum(math.log(n / (u[b, j] + n)) for j in others) / 4
        assert memory(student, teacher, labels).item() == pytest.approx(expected, rel=1e-6)

    def test_memory_holds_the_latest_whatever_the_order(self):
        memory = Memory(5, 2, 0.1).train()
        stored = [F.normalize(torch.randn(3, 2), dim=1) for _ in range(3)]
        for step, x in enumerate(stored):
            memory(x, -x, torch.full((3,), step))
        latest = torch.cat(stored)[-5:]
        order = memory.vectors[:, 0, 0].argsort()
        torch.testing.assert_close(memory.vectors[order, 0], latest[latest[:, 0].argsort()])
        torch.testing.assert_close(memory.vectors[:, 1], -memory.vectors[:, 0])
        assert sorted(memory.keys.tolist()) == [1, 1, 2, 2, 2]

    def test_one_batch_may_be_longer_than_the_memory(self):
        memory = Memory(4, 2, 0.1).train()
        x = F.normalize(torch.randn(7, 2), dim=1)
        memory(x, x, torch.arange(7))
        assert sorted(memory.keys.tolist()) == [3, 4, 5, 6]
        memory(x[:2], x[:2], torch.tensor([7, 8]))
        assert sorted(memory.keys.tolist()) == [5, 6, 7, 8]

    def test_images_of_the_same_class_are_no_negatives(self):
        memory = Memory(16, 4, 0.2).train()
        x, t = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
        memory(x, t, torch.zeros(4, dtype=torch.int64))
        memory.eval()
        alone = memory(x, t, torch.zeros(4, dtype=torch.int64))
        assert memory.count == 4
        with_others = memory(x, t, torch.ones(4, dtype=torch.int64))
        assert with_others > alone

    def test_without_labels_only_the_image_itself_is_left_out(self):
        memory = Memory(16, 4, 0.2).train()
        x, t = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
        by_number = copy.deepcopy(memory)(x, t, torch.arange(4))
        torch.testing.assert_close(memory(x, t, None), by_number)
        memory(x, t, None)
        assert memory.keys[:8].unique().numel() == 8

    def test_state_goes_on_where_it_was_saved(self):
        method = CRD(negatives=6, width=4)
        method.bind(VECTORS)
        for _ in range(3):
            compared(method, *vectors(4), torch.randint(0, 5, (4,)))
        other = CRD(negatives=6, width=4)
        other.bind(VECTORS)
        other.load_state_dict(method.state_dict())
        student, teacher = vectors(4)
        labels = torch.tensor([0, 1, 2, 3])
        for _ in range(2):
            assert compared(other, student, teacher, labels) == compared(method, student, teacher, labels)

    def test_learning_brings_pairs_together(self):
        method = CRD(negatives=32, width=8)
        method.bind(VECTORS)
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        student = torch.randn(16, 32)
        teacher, labels = student @ torch.randn(32, 40), torch.arange(16)
        for _ in range(60):
            optimizer.zero_grad()
            compared(method, student, teacher, labels).backward()
            optimizer.step()
        s, t = (
            F.normalize(method.embed_student[0](student), dim=1),
            F.normalize(method.embed_teacher[0](teacher), dim=1),
        )
        assert ((s @ t.T).argmax(1) == labels).float().mean() > 0.9


def family_models() -> dict[str, nn.Module]:
    return {
        "cnn": tiny_cnn(),
        "vit": tiny_vit(),
        "swin": SwinTransformer(
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
            num_classes=10,
        ),
        "mixer": MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=4, num_classes=10),
    }


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("vit", "cnn"), ("swin", "cnn"), ("mixer", "cnn"), ("cnn", "vit"), ("cnn", "mixer"), ("cnn", "swin")],
)
def test_every_method_on_every_kind_of_pair(teacher, student, method):
    models = family_models()
    for model in models.values():  # timm starts some heads at zero, which say nothing
        nn.init.normal_(model.get_classifier().weight, std=0.1)
    sizes = {"teacher": 32, "student": 32}
    distiller = Distiller(models[teacher], models[student], method, input_size=sizes)
    images, labels = batch()
    output = distiller(images, labels)
    output.loss.backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in output.terms.values())
    assert all(term.item() > 0 for term in output.terms.values())
    assert sum(row.added_parameters for row in distiller.plan.rows) == distiller.plan.added_parameters
    untaught = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert not untaught
    first = next(p for p in models[student].parameters() if p.ndim == 4)
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["fitnet", "at", "cc", "rkd", "crd", "rsd", "sfkd", "uhkd"])
def test_feature_methods_without_labels_and_without_logits(method):
    teacher = tiny_vit(num_classes=0)
    student = tiny_cnn(num_classes=0)
    distiller = Distiller(teacher, student, method, ce_weight=0, kd_weight=0, input_size=32)
    output = distiller(batch()[0])
    output.loss.backward()
    assert output.loss > 0
    assert next(student.parameters()).grad.abs().sum() > 0


def test_pooled_vectors_are_a_stage_by_name():
    distiller = Distiller(tiny_vit(), tiny_cnn(), "rsd", input_size=32)
    assert [(row.stage, row.teacher, row.student) for row in distiller.plan.rows] == [("pooled", "pooled", "pooled")]
    by_name = Distiller(tiny_vit(), tiny_cnn(), ["rsd", "rkd"], stages=["pooled"], input_size=32)
    assert [row.teacher for row in by_name.plan.rows] == ["pooled", "pooled"]
    at_stages = Distiller(tiny_vit(), tiny_cnn(), "rsd", stages=[2, 3], input_size=32)
    assert len(at_stages.method.pairs) == 2
    of_sfkd = Distiller(tiny_vit(), tiny_cnn(), "sfkd", stages=[3, ("pooled", "pooled")], input_size=32)
    assert of_sfkd(*batch()).loss.isfinite()


class TestCombined:
    def test_terms_add_up_and_what_is_common_counts_once(self):
        teacher, student = tiny_vit(), tiny_cnn()
        nn.init.normal_(teacher.head.weight)
        distiller = Distiller(teacher, student, ["kd", SFKD(temperature=1), "rsd"], input_size=32)
        images, labels = batch()
        output = distiller(images, labels)
        assert list(output.terms)[:2] == ["ce", "kd"]
        assert [name.split(".")[0] for name in output.terms] == ["ce", "kd", *["sfkd"] * 4, "rsd"]
        alone = Distiller(teacher, copy.deepcopy(student), "kd", input_size=32)(images, labels)
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
        assert kd.kd_weight == sfkd.kd_weight == sfkd.ce_weight == 1
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
            alone = Distiller(teacher, copy.deepcopy(student), "kd", input_size=64)(images, labels)
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


@pytest.mark.parametrize("method", ["rkd", "cc", "rsd", "dist", "crd", "ofa", "sfkd", "uhkd"])
def test_a_batch_of_one_is_refused_in_training(method):
    distiller = Distiller(tiny_vit(), tiny_cnn(), method, input_size=32)
    with pytest.raises(ValueError, match="a batch of one image"):
        distiller(*batch(1))


@pytest.mark.parametrize("method", ["rkd", "cc", "rsd", "ofa", ["kd", "cc"]])
def test_a_batch_of_one_a_process_is_refused_where_processes_do_not_look_at_others(method, monkeypatch):
    monkeypatch.setattr("hetkd.distillation.world_size", lambda: 2)
    distiller = Distiller(tiny_vit(), tiny_cnn(), method, input_size=32)
    with pytest.raises(ValueError, match="a batch of one image"):
        distiller(*batch(1))


def test_crd_at_a_low_temperature_stays_finite():
    method = CRD(contrast_temperature=0.005)
    student, teacher = vectors(8)
    assert compared(method, student, teacher, torch.arange(8)).isfinite()
    assert method.memories[0].log_scale.isfinite().all()


def test_bad_options_are_refused():
    for method in (DKD, DIST, DeiT):
        with pytest.raises(ValueError, match="kd_weight=0 leaves method"):
            method(kd_weight=0)
    with pytest.raises(ValueError, match="distance_weight and angle_weight are all 0"):
        RKD(distance_weight=0, angle_weight=0)
    with pytest.raises(ValueError, match=r"negatives=0\.5"):
        CRD(negatives=0.5)
    with pytest.raises(ValueError, match="empty list"):
        Distiller([], tiny_cnn(), "kd")
    with pytest.raises(ValueError, match="alpha=-1"):
        DKD(alpha=-1)
    with pytest.raises(ValueError, match="scores 'logit'"):
        DIST(scores="logit")
    with pytest.raises(ValueError, match="gamma=0"):
        OFA(gamma=0)
    with pytest.raises(ValueError, match="expansion=0"):
        RSD(expansion=0)
    with pytest.raises(ValueError, match="negatives=-5"):
        CRD(negatives=-5)
    with pytest.raises(ValueError, match="form 'matrix'"):
        CC(form="matrix")
