"""Several methods at once."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Features, StagePair
from hetkd.methods.common.method import Method, Targets, make_method
from hetkd.methods.kd import CE, KD
from hetkd.spectral.precision import at_least_float32
from hetkd.utils.checks import positive


class Composite(Method):
    """Base of methods made of methods: each part sees its own stage pairs, and its terms are weighted.

    Args:
        parts: Methods that serve no distiller yet.
        weights: One weight a part.
        ce_weight: Weight of the cross-entropy with the labels, which counts once for all parts.
        kd_weight: Weight of the KL divergence, as far as it counts once.
        temperature: T of this KL divergence.
    """

    def __init__(
        self,
        parts: Sequence[Method],
        weights: Sequence[float],
        *,
        ce_weight: float,
        kd_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature)
        for part in parts:
            part.ce_weight = 0.0
        self.parts = nn.ModuleList(parts)
        self.weights = tuple(weights)
        self.uses_distillation_token = any(part.uses_distillation_token for part in parts)
        scopes = {part.batch_statistics for part in parts}
        self.batch_statistics = next((scope for scope in ("process", "all") if scope in scopes), None)

    @property
    def methods(self) -> list[Method]:
        """The parts, in order."""
        return [part for part in self.parts if isinstance(part, Method)]

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether any part does."""
        return self.kd_weight > 0 or any(part.uses_teacher_logits for part in self.methods)

    @property
    def uses_student_logits(self) -> bool:
        """Whether any part does."""
        return super().uses_student_logits or any(part.uses_student_logits for part in self.methods)

    @property
    def compares_features(self) -> bool:
        """Whether any part does."""
        return any(part.compares_features for part in self.methods)

    @property
    def title(self) -> str:
        """The names of the parts in the plan."""
        return " + ".join([*(["KD"] if self.kd_weight else []), *(part.title for part in self.methods)]) or "CE"

    def settings(self) -> dict[str, Any]:
        """Return the weights, and the options of each part."""
        return {
            "name": type(self).__name__,
            "ce_weight": self.ce_weight,
            "kd_weight": self.kd_weight,
            "temperature": self.temperature,
            "weights": self.weights,
            "parts": [part.settings() for part in self.methods],
        }

    def _bind_parts(self, pairs: Sequence[Sequence[StagePair]]) -> None:
        super().bind([pair for of_part in pairs for pair in of_part])
        for part, of_part in zip(self.methods, pairs, strict=True):
            part.classes, part.task = self.classes, self.task
            part.bind(of_part)
        self.pairs = tuple(pair for part in self.methods for pair in part.pairs or ())

    def _shares(self) -> Iterable[tuple[int, Method, slice]]:
        """Yield each part with its number and its share of the stage pairs."""
        start = 0
        for number, part in enumerate(self.methods):
            end = start + len(part.pairs or ())
            yield number, part, slice(start, end)
            start = end

    def _part_of(self, index: int) -> tuple[Method, int]:
        for _, part, share in self._shares():
            if share.start <= index < share.stop:
                return part, index - share.start
        raise IndexError(f"there is no stage pair {index}.")

    def describe_pair(self, index: int) -> str:
        """Return the words of the part that has this stage pair."""
        part, own = self._part_of(index)
        return part.describe_pair(own)

    def added_parameters(self, index: int) -> int:
        """Return the number that the part with this stage pair adds."""
        part, own = self._part_of(index)
        return part.added_parameters(own)

    def remark(self) -> str:
        """Return the remarks of all parts."""
        return " ".join(dict.fromkeys(part.remark() for part in self.methods if part.remark()))

    def describe_logits(self) -> str:
        """Return the words of all parts."""
        each = [super().describe_logits(), *(part.describe_logits() for part in self.methods)]
        return "; ".join(words for words in each if words)

    def feature_terms(self, student: Features, targets: Targets, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the weighted terms of all parts."""
        terms: dict[str, Tensor] = {}
        for number, part, share in self._shares():
            own = Features(student.logits, student.maps[share], student.pooled, student.distillation_logits)
            for name, term in part(own, self._targets_of(number, targets), labels).items():
                full_name = self._term_name(number, name)
                if full_name in terms or (self.kd_weight and full_name == self.logit_term):
                    raise ValueError(f"two methods have a term {full_name!r}: give one of them another name.")
                terms[full_name] = self.weights[number] * term
        return terms

    def _term_name(self, number: int, name: str) -> str:
        return name

    def _targets_of(self, number: int, targets: Targets) -> Targets:
        prefix = target_name(number, "")
        return {name.removeprefix(prefix): x for name, x in targets.items() if name.startswith(prefix)}


class Combined(Composite):
    """Methods added up: ``Distiller(..., method=["kd", SFKD(...)])`` or ``method=Combined([...], weights=[...])``.

    Terms keep their names. What several methods have in common counts once, with the largest of its weights: the
    cross-entropy with the labels, and the KL divergence to the teacher's logits.

    Args:
        methods: Names or `Method` objects, of different classes; objects are copied.
        weights: A factor for each method's terms except the cross-entropy; ``None``: 1 each.

    Raises:
        ValueError: If there are no methods, one occurs twice, the number of weights is wrong, a weight is not positive,
            or KL divergences of different temperature are mixed.
        TypeError: If a method is neither a name nor a `Method`.
    """

    def __init__(self, methods: Sequence[str | Method], weights: Sequence[float] | None = None) -> None:
        made = [copy.deepcopy(make_method(method, {})) for method in methods]
        if any(method.pairs is not None for method in made):
            raise ValueError("method has one that serves another Distiller already; make a new one.")
        factors = checked_weights("weights", weights, len(made), "methods", default=1.0)
        names = [type(method).__name__ for method in made]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"method has {', '.join(sorted(twice))} more than once; give it one larger weight instead."
            )
        with_kl = [(w, m) for w, m in zip(factors, made, strict=True) if _has_plain_kl(m)]
        if len({m.temperature for _, m in with_kl}) > 1:
            theirs = ", ".join(f"{type(m).__name__} (T = {m.temperature:g})" for _, m in with_kl)
            raise ValueError(
                f"the methods have KL divergences of different temperature: {theirs}. Give them the same one, or set "
                f"kd_weight=0 in all but one: method=[{type(with_kl[0][1]).__name__}(temperature=...), ...]."
            )
        ce_weight = max(method.ce_weight for method in made)
        kd_weight = max((w * m.kd_weight for w, m in with_kl), default=0.0)
        for _, method in with_kl:
            method.kd_weight = 0.0
        rest = [(w, m) for w, m in zip(factors, made, strict=True) if type(m) not in (CE, KD)]
        super().__init__(
            [m for _, m in rest],
            [w for w, _ in rest],
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            temperature=with_kl[0][1].temperature if with_kl else 1.0,
        )
        self._counts: list[int] | None = None  # of the parts' automatic pairs

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Return those of all parts, one after the other; see `Method.automatic_pairs`."""
        of_parts = [part.automatic_pairs(pairs, pooled) for part in self.methods]
        self._counts = [len(of_part) for of_part in of_parts]
        return [pair for of_part in of_parts for pair in of_part]

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Give each part its automatic pairs, or each part that compares features the user's; see `Method.bind`."""
        if self._counts is None:
            self._bind_parts([pairs if part.compares_features else [] for part in self.methods])
        else:
            rest = iter(pairs)
            self._bind_parts([[next(rest) for _ in range(count)] for count in self._counts])

    def teacher_stages(self) -> list[str]:
        """Return those of all parts; see `Method.teacher_stages`."""
        return [name for part in self.methods for name in part.teacher_stages()]

    @torch.no_grad()
    def encode(self, teacher: Features, /) -> Targets:
        """Return the targets of all parts; the logits, which they have in common, once."""
        targets: Targets = {}
        if self.uses_teacher_logits and teacher.logits is not None:
            targets["logits"] = self.task.compact(at_least_float32(teacher.logits.detach()))
        maps = iter(teacher.maps)
        for number, part in enumerate(self.methods):
            own = tuple(next(maps) for _ in part.teacher_stages())
            encoded = part.encode(Features(None, own, teacher.pooled))
            targets |= {target_name(number, name): x for name, x in encoded.items()}
        return targets

    def describe_targets(self, source: int = 0) -> dict[str, dict[str, Any]]:
        """Return those of all parts; see `Method.describe_targets`."""
        logits = {"logits": {"teacher": source, "what": "logits"}} if self.uses_teacher_logits else {}
        of_parts = enumerate(part.describe_targets(source) for part in self.methods)
        stages = {target_name(n, name): x for n, part in of_parts for name, x in part.items() if name != "logits"}
        return {**logits, **stages}

    def _targets_of(self, number: int, targets: Targets) -> Targets:
        shared = {"logits": targets["logits"]} if "logits" in targets else {}
        return shared | super()._targets_of(number, targets)


def target_name(part: int, name: str) -> str:
    """Return the name of a target of one part among those of all parts."""
    return f"part{part}.{name}"


def _has_plain_kl(method: Method) -> bool:
    own = type(method)
    is_plain = own.logit_loss is Method.logit_loss and own.compare_logits is Method.compare_logits
    return method.kd_weight > 0 and is_plain


def checked_weights(
    argument: str, weights: Sequence[float] | None, count: int, of_what: str, default: float
) -> list[float]:
    """Return one weight a part, all ``default`` without ``weights``.

    Raises:
        ValueError: If there are no parts, their number is another than that of the weights, or one is not positive.
        TypeError: If ``weights`` is no sequence of numbers.
    """
    if not count:
        raise ValueError(f"there are no {of_what}.")
    if weights is None:
        return [default] * count
    if isinstance(weights, dict) or not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"{argument}={weights!r} must be a list of {count} numbers.")
    if len(weights) != count:
        raise ValueError(f"{argument}={tuple(weights)} has {len(weights)} entries for {count} {of_what}.")
    return [positive(argument, float(weight)) for weight in weights]
