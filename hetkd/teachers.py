"""The teachers of a distillation, live or recorded, one or several."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Features, Stage, StagePair
from hetkd.features.tap import Size, Tap, as_size
from hetkd.methods.common.combined import Composite, checked_weights, target_name
from hetkd.methods.common.method import Method, Targets
from hetkd.models.inputs import InputSpec, InputTransform, Normalization
from hetkd.models.labels import Labels, model_labels
from hetkd.utils.checks import unknown_name


@dataclass(frozen=True)
class Encoded:
    """The teachers' answer to a batch of images.

    Attributes:
        targets: What the method learns from; a cache keeps it.
        logits: ``[B, classes]``, of several teachers those whose softmax is the mean of their probabilities; ``None``
            where they have none in common.
    """

    targets: Targets
    logits: Tensor | None


class Teachers(Sequence[nn.Module]):
    """The teachers and the method that encodes their features. As a sequence: the modules that are run.

    They are no ``nn.Module``: teachers are in no ``parameters()``, ``state_dict()`` or DDP bucket.

    Args:
        taps: How each teacher is run; none for a method without a teacher.
        method: The bound method; of several teachers a `MultiTeacher`.
    """

    def __init__(self, taps: Sequence[Tap], method: Method) -> None:
        self.taps, self.method = list(taps), method

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """Run the teachers on raw images ``[B, C, H, W]``, and encode their features for the method."""
        return self.encode_features([tap.run(images) for tap in self.taps])

    @torch.no_grad()
    def encode_features(self, features: Sequence[Features]) -> Encoded:
        """Encode the features of each teacher for the method, as `encode` does."""
        if not features:
            return Encoded({}, None)
        targets = [part.encode(x) for part, x in zip(parts_of(self.method, len(features)), features, strict=True)]
        if len(targets) == 1:
            return Encoded(targets[0], features[0].logits)
        named = {target_name(n, name): x for n, of_part in enumerate(targets) for name, x in of_part.items()}
        return Encoded(named, _joint_logits(features))

    def to(self, device: torch.device) -> None:
        """Move all teachers; their dtypes stay."""
        for tap in self.taps:
            tap.to(device)

    def fingerprints(self) -> list[str]:
        """Return a digest of each teacher's weights and buffers."""
        return [tap.fingerprint or fingerprint_model(tap.model) for tap in self.taps]

    @property
    def live(self) -> list[Tap]:
        """The taps whose models are here."""
        return self.taps

    @property
    def cache(self) -> str | None:
        """The folder that stands in for the models, if they are not here."""
        return None

    def __getitem__(self, index: Any) -> Any:
        return [tap.model for tap in self.live][index]

    def __len__(self) -> int:
        return len(self.live)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(tap.title for tap in self.taps)})"


class RecordedTeachers(Teachers):
    """Teachers of which only a cache is here: their stages are known, and `fit` reads their targets from it."""

    taps: list["RecordedTap"]  # type: ignore[assignment]

    @property
    def live(self) -> list[Tap]:
        """None."""
        return []

    @property
    def cache(self) -> str | None:
        """The cache's folder."""
        return self.taps[0].recorded.cache


@dataclass(frozen=True)
class RecordedTeacher:
    """A cache's knowledge of a teacher whose weights are not here.

    Attributes:
        cache: The cache's folder.
        title: The teacher's name in the plan.
        fingerprint: Digest of its weights.
        spec: The images that it was made for.
        size: Height and width in pixels of the images that it saw.
        classes: Number of classes of its classifier, or ``None``.
        pooled: Length of the vector before the classifier, or ``None``.
        stages: Those that can be chosen.
        is_dense: Whether its logits are maps.
        label_names: The names of its classes, if it carries them.
    """

    cache: str
    title: str
    fingerprint: str
    spec: InputSpec
    size: tuple[int, int]
    classes: int | None
    pooled: int | None
    stages: tuple[Stage, ...]
    is_dense: bool = False
    label_names: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def of(cls, tap: Tap, fingerprint: str) -> "RecordedTeacher":
        """Return what to record of a live teacher."""
        names = tuple(tap.labels.names) if tap.labels is not None and tap.labels.certain else None
        known = tap.spec, tap.size, tap.classes, tap.pooled, tuple(tap.stages), tap.is_dense, names
        return cls("", tap.title, fingerprint, *known)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, without the folder."""
        values = asdict(self)
        unused = [name for name in ("is_dense", "label_names") if not values[name]]
        return {name: value for name, value in values.items() if name not in ("cache", *unused)}

    @classmethod
    def from_json(cls, cache: str, values: dict[str, Any]) -> "RecordedTeacher":
        """Read the values of `to_json`."""
        spec, stages = InputSpec(**values["spec"]), tuple(Stage(**stage) for stage in values["stages"])
        names = values.get("label_names")
        label_names = None if names is None else tuple(tuple(each) for each in names)
        read = {"cache": cache, "spec": spec, "size": tuple(values["size"]), "stages": stages}
        return cls(**{**values, **read, "label_names": label_names})


class RecordedTap(Tap):
    """The tap of a recorded teacher: its stages are known, and it cannot be run."""

    def __init__(
        self, role: str, recorded: RecordedTeacher, size: Size | None, normalized: Normalization | None
    ) -> None:
        if size is not None and as_size(size) != recorded.size:
            raise ValueError(
                f"input_size has {size!r} for the {role}, but the cache {recorded.cache!r} was made at "
                f"{recorded.size[0]} x {recorded.size[1]}: leave it out."
            )
        self.role, self.recorded, self.model = role, recorded, nn.Identity()
        self.spec, self.size = recorded.spec, recorded.size
        self.stages, self.classes, self.pooled = list(recorded.stages), recorded.classes, recorded.pooled
        self.listed, self.is_dense = self.stages, recorded.is_dense
        self.why_no_stages = "" if self.stages else "the cached teacher yields no feature map"
        self.inputs = InputTransform(self.spec, self.size, normalized)
        self.names = []
        self.placement, self.fingerprint = "cache", recorded.fingerprint

    @property
    def labels(self) -> Labels | None:
        """The names of the teacher's classes, as far as the cache knows them."""
        names = self.recorded.label_names
        return model_labels(self.model, self.classes) if names is None else Labels(list(names), certain=True)

    @property
    def title(self) -> str:
        """The teacher's name in the plan when it was cached."""
        return self.recorded.title

    def add_stages(self, names: Sequence[str]) -> None:
        """Refuse stages that the cache does not know.

        Raises:
            ValueError: If there is one.
        """
        known = [stage.name for stage in self.all_stages]
        for name in names:
            if name not in known:
                raise unknown_name(f"stage of the cached {self.role}", name, known)

    def run(self, images: Tensor) -> NoReturn:
        """Refuse to run.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"of the {self.role} only the cache {self.recorded.cache!r} is here: train with fit and the images that "
            "it was made of."
        )


class MultiTeacher(Composite):
    """One method, and several teachers: each teacher teaches by a copy of it, with projections of its own.

    `hetkd.Distiller` makes it of a list of teachers. Terms are named ``teacher0.kd`` and so on; the cross-entropy with
    the labels counts once.

    Args:
        parts: The method, once a teacher.
        weights: A factor for the terms of each teacher; ``None``: equal ones with sum 1.

    Raises:
        ValueError: If the method uses no teacher, the number of weights is another than that of the teachers, or a
            weight is not positive.
    """

    def __init__(self, parts: Sequence[Method], weights: Sequence[float] | None = None) -> None:
        if not parts[0].uses_teacher:
            raise ValueError(f"there are {len(parts)} teachers, but {type(parts[0]).__name__} uses none.")
        factors = checked_weights("teacher_weights", weights, len(parts), "teachers", default=1 / len(parts))
        super().__init__(parts, factors, ce_weight=parts[0].ce_weight)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Give each part the stage pairs of its teacher (`hetkd.StagePair.source`); see `Method.bind`."""
        self._bind_parts([[pair for pair in pairs if pair.source == n] for n in range(len(self.parts))])

    def encode(self, teacher: Features, /) -> Targets:
        """Refuse: each part encodes its own teacher, in `Teachers.encode`.

        Raises:
            TypeError: Always.
        """
        raise TypeError("several teachers are encoded by Teachers.encode(images), each by its own part.")

    def describe_targets(self, source: int = 0) -> dict[str, dict[str, Any]]:
        """Return those of each teacher's part; see `Method.describe_targets`."""
        of_parts = enumerate(part.describe_targets(number) for number, part in enumerate(self.methods))
        return {target_name(number, name): x for number, part in of_parts for name, x in part.items()}

    @property
    def title(self) -> str:
        """The name of the method, which all teachers have in common."""
        return self.methods[0].title

    def describe_logits(self) -> str:
        """Return the plan's words on the logits of each teacher."""
        return self.methods[0].describe_logits()

    def _term_name(self, number: int, name: str) -> str:
        return f"teacher{number}.{name}"


def parts_of(method: Method, teachers: int) -> Iterator[Method]:
    """Yield the method that encodes each teacher: its part of a `MultiTeacher`, else the method itself."""
    yield from method.methods if isinstance(method, MultiTeacher) else [method] * teachers


def fingerprint_model(model: nn.Module) -> str:
    """Return a digest of all weights and buffers."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes_of(x))
    return digest.hexdigest()


def _bytes_of(x: Any) -> bytes:
    if not isinstance(x, Tensor):  # packed weights and settings of quantised modules
        return repr(x).encode()
    if x.is_quantized or type(x) not in (Tensor, nn.Parameter):
        x = x.dequantize() if hasattr(x, "dequantize") else x
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _joint_logits(features: Sequence[Features]) -> Tensor | None:
    """Return logits whose softmax is the mean of the teachers' probabilities; ``None`` if they cannot be averaged."""
    logits = [x.logits for x in features if x.logits is not None]
    if len(logits) < len(features) or len({x.shape for x in logits}) > 1:
        return None
    return torch.stack([x.log_softmax(1) for x in logits]).logsumexp(0)
