"""``mobilenet_ext.contract`` says what ``csrc/ops.h`` says, and every backend has every op of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mobilenet_ext import contract, ops
from mobilenet_ext.backends import cpu, reference

HEADER = (Path(__file__).parent.parent / "csrc" / "ops.h").read_text()


def enumerators(declaration: str) -> list[str]:
    """The names of an enumeration of the header, in order."""
    found = re.search(rf"{re.escape(declaration)} {{(.*?)}};", HEADER, re.DOTALL)
    assert found, declaration
    return re.findall(r"\w+", found.group(1))


@pytest.mark.parametrize(("declaration", "count"), [("enum BnRow", "BN_ROWS"), ("enum GradBnRow", "GRAD_ROWS")])
def test_rows(declaration: str, count: str) -> None:
    *rows, last = enumerators(declaration)
    assert last == count and getattr(contract, count) == len(rows)
    assert [getattr(contract, row) for row in rows] == list(range(len(rows)))


def test_activations() -> None:
    assert [act.name.lower() for act in sorted(contract.Act)] == enumerators("enum class Act : int")


def test_ops() -> None:
    """The op set has one implementation per name in the reference, the CPU library and ``ops``."""
    convolutions = [f"{kind}_{pass_}" for kind in ops.FORWARD for pass_ in ("forward", "backward", "inference")]
    others = re.findall(r"\bX\((\w+), \"", HEADER)
    names = convolutions + [name for name in others if name != "conv"]
    assert {"depthwise_forward", "norm_act_backward", "block_inference"} <= set(names)
    for name in names:
        assert callable(getattr(reference, name)) and getattr(cpu.kernels, name).default, name
        assert getattr(ops, name).name() == f"mobilenet_ext::{name}"
