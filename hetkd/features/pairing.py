"""Pairs of a teacher stage and the student stage that learns from it."""

import math
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from hetkd.features.adapter import Stage, StagePair, find_stage

STAGE_COUNT = 4

POOLED = "pooled"
"""The stage that is the vector before the classifier; it is at no depth."""

_FEW_GRIDS = 2

StageChoice = int | str | tuple[int | str, int | str]


def choose_stages(stages: Sequence[Stage], count: int = STAGE_COUNT) -> list[Stage]:
    """Pick up to ``count`` stages spread over a model's depth and its resolutions.

    A hierarchical model gives the last stage at each of its ``count`` coarsest grids. A model with one or two grids
    gives more of each: stages at equal steps of depth, the last one included.

    Args:
        stages: All stages, in order of depth.
        count: How many are wanted.
    """
    at_grid: dict[tuple[int, int], list[Stage]] = {}
    for stage in stages:
        at_grid.setdefault(stage.grid, []).append(stage)
    groups = list(at_grid.values())
    groups = groups[max(0, len(groups) - count) :]
    picks = [1] * len(groups)
    for _ in range(min(count, len(stages)) - len(groups) if len(groups) <= _FEW_GRIDS else 0):
        longest = max(range(len(groups)), key=lambda group: len(groups[group]) / picks[group])
        picks[longest] += 1
    return [
        group[(step + 1) * len(group) // steps - 1]
        for group, steps in zip(groups, picks, strict=True)
        for step in range(steps)
    ]


def pair_stages(teacher: Sequence[Stage], student: Sequence[Stage]) -> list[StagePair]:
    """Pair teacher and student stages automatically: as many as both have, last with last.

    Where one model has fewer, its others meet the stages of the most similar grids.

    Example:
        >>> grids = (56, 28, 14, 7)
        >>> teacher = [Stage(f"blocks.{n}", 192, 14, 14) for n in range(12)]
        >>> student = [Stage(f"layer{n}", 64, grid, grid) for n, grid in enumerate(grids, start=1)]
        >>> [(pair.teacher.name, pair.student.name) for pair in pair_stages(teacher, student)]
        [('blocks.2', 'layer1'), ('blocks.5', 'layer2'), ('blocks.8', 'layer3'), ('blocks.11', 'layer4')]
        >>> teacher = [Stage(f"layers.{n}", 96, grid, grid) for n, grid in enumerate(grids[:3])]
        >>> [(pair.teacher.name, pair.student.name) for pair in pair_stages(teacher, student)]
        [('layers.0', 'layer1'), ('layers.1', 'layer2'), ('layers.2', 'layer4')]
    """
    count = min(len(choose_stages(teacher)), len(choose_stages(student)))
    choices = product(_ways_to_choose(teacher, count), _ways_to_choose(student, count))
    teacher, student = min(choices, key=lambda chosen: _difference_of_grids(*chosen))
    return [StagePair(t, s) for t, s in zip(teacher, student, strict=True)]


def _ways_to_choose(stages: Sequence[Stage], count: int) -> list[Sequence[Stage]]:
    """Return ways to choose ``count`` stages with the last one; that of `choose_stages`, which wins ties, first."""
    if count == 0:
        return [[]]
    *others, last = choose_stages(stages)
    return [choose_stages(stages, count), *((*chosen, last) for chosen in combinations(others, count - 1))]


def _difference_of_grids(teacher: Sequence[Stage], student: Sequence[Stage]) -> float:
    return sum(
        abs(math.log(t.height / s.height)) + abs(math.log(t.width / s.width))
        for t, s in zip(teacher, student, strict=True)
    )


def chosen_pairs(
    teacher: Sequence[Stage],
    student: Sequence[Stage],
    choices: Sequence[StageChoice],
    listed: tuple[Sequence[Stage], Sequence[Stage]],
) -> list[StagePair]:
    """Resolve the user's ``stages``.

    Args:
        teacher: All stages of the teacher.
        student: All stages of the student.
        choices: Each a row of the automatic pairing (int; negative from the end), a student stage by name (the
            teacher's is the one at the same relative depth), or a pair (teacher, student) of names or rows.
        listed: Of teacher and student, the stages that their adapters list, on which the automatic pairing and relative
            depth are founded: naming another module changes neither.

    Raises:
        ValueError: If a name or row does not exist; the nearest names are given.
        TypeError: If a choice is of none of these forms.
    """
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence):
        raise TypeError(f"stages={choices!r} must be a list of rows, names or (teacher, student) pairs.")
    if not choices:
        raise ValueError("stages=[] leaves nothing to compare; leave it out for the automatic pairing.")
    return [_resolve(choice, listed, teacher, student) for choice in choices]


def chosen_names(choices: Any, side: int) -> list[str]:
    """Return the names of stages in the user's ``stages``: 0 those of the teacher, 1 those of the student."""
    if not isinstance(choices, (tuple, list)):
        return []
    names = [choice[side] for choice in choices if isinstance(choice, (tuple, list)) and len(choice) == 2]
    if side == 1:
        names += choices
    return [name for name in names if isinstance(name, str)]


def _resolve(
    choice: StageChoice,
    listed: tuple[Sequence[Stage], Sequence[Stage]],
    teacher: Sequence[Stage],
    student: Sequence[Stage],
) -> StagePair:
    automatic = pair_stages(*listed)
    if isinstance(choice, bool):
        raise TypeError(f"stages has {choice!r}; use rows, names or (teacher, student) pairs.")
    if isinstance(choice, int):
        return automatic[_row(choice, len(automatic))]
    if isinstance(choice, str):
        chosen = find_stage("student stage", choice, student)
        if choice == POOLED:
            return StagePair(find_stage("teacher stage", POOLED, teacher), chosen)
        return StagePair(_at_depth(listed[0], _depth(chosen, student, listed[1])), chosen)
    if not isinstance(choice, (tuple, list)) or len(choice) != 2:
        raise TypeError(f"stages has {choice!r}; use rows, names or (teacher, student) pairs.")
    sides = (
        ("teacher stage", choice[0], teacher, [pair.teacher for pair in automatic]),
        ("student stage", choice[1], student, [pair.student for pair in automatic]),
    )
    resolved = [
        rows[_row(name, len(rows))] if type(name) is int else find_stage(what, str(name), stages)
        for what, name, stages, rows in sides
    ]
    return StagePair(resolved[0], resolved[1])


def _depth(stage: Stage, stages: Sequence[Stage], listed: Sequence[Stage]) -> float:
    """Return the relative depth of a stage, 0 to 1; one that is not listed stands half-way between two that are."""
    before = [other for other in stages[: list(stages).index(stage)] if other in listed]
    return (len(before) + (1 if stage in listed else 0.5)) / len(listed)


def _at_depth(stages: Sequence[Stage], depth: float) -> Stage:
    return stages[max(0, round(depth * len(stages)) - 1)]


def _row(row: int, count: int) -> int:
    if not -count <= row < count:
        raise ValueError(f"stages has row {row}, but the automatic pairing has rows 0 to {count - 1}.")
    return row
