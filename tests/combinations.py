"""Parameters of tests: of all combinations those that plain ``pytest`` runs, and the others, which are slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import pytest


def combinations(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Plain are as many combinations as have each two values of two axes together: most faults take one value, or two
    (D. R. Kuhn et al., IEEE TSE 30 (2004) 418)."""
    axes = [list(axis) for axis in axes]
    places = {
        place: set(itertools.combinations(enumerate(place), 2))
        for place in itertools.product(*(range(len(axis)) for axis in axes))
    }
    missing, plain = set().union(*places.values()), set()
    while missing:
        most = max(places, key=lambda place: len(places[place] & missing))
        missing -= places[most]
        plain.add(most)
    cases = [_case([axis[i] for axis, i in zip(axes, place, strict=True)], place in plain) for place in places]
    return pytest.mark.parametrize(names, cases, ids=_name)


def in_turn(names: str, values: Sequence[Any], first: Any, others: Sequence[Any]) -> pytest.MarkDecorator:
    """Plain are each of ``values`` with ``first``, and with one of ``others``, which take turns."""
    cases = []
    for i, value in enumerate(values):
        cases.append(_case([value, first], True))
        cases += [_case([value, other], j == i % len(others)) for j, other in enumerate(others)]
    return pytest.mark.parametrize(names, cases, ids=_name)


def _name(value: Any) -> str:
    return value.name.lower() if isinstance(value, Enum) else str(value)


def _case(values: list[Any], plain: bool) -> Any:
    """With the marks of those values that have some."""
    marks = [] if plain else [pytest.mark.slow]
    for i, value in enumerate(values):
        if isinstance(value, type(pytest.param())):
            marks += value.marks
            (values[i],) = value.values
    return pytest.param(*values, marks=marks)
