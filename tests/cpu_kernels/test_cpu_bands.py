"""Convolutions that a plan of the CPU runs band by band: the bits of the ops one by one, and what is between them is
never whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_ops import DTYPES, activation, cases, random_bn
from torch import Tensor

from mobilenet_ext import backends
from mobilenet_ext.contract import NO_PADDING, Act
from mobilenet_ext.inference_steps import Step, execute, steps_of
from mobilenet_ext.unit_tensors import InferenceUnit

# Images, channels in, expanded and out, height, width, kernel, stride, padding: most have more expanded values than are
# made at once.
SHAPES = [
    (3, 16, 96, 24, 57, 53, 3, 2, (1, 1, 1, 1)),
    (3, 24, 72, 24, 57, 53, 5, 1, (2, 2, 2, 2)),
    (5, 13, 100, 7, 40, 41, 3, 1, (0, 1, 0, 1)),
    (1, 8, 48, 40, 120, 119, 5, 2, (0, 1, 2, 0)),
    (40, 64, 384, 64, 7, 7, 3, 1, (1, 1, 1, 1)),
    (50, 16, 96, 24, 15, 16, 3, 2, (0, 1, 0, 1)),  # a last row that nobody reads
    (2, 3, 130, 33, 2, 1030, 3, 1, (1, 1, 1, 0)),
    (2, 3, 65, 33, 4100, 1, 3, 2, (1, 1, 0, 0)),
    (2, 3, 8, 8, 9, 9, 3, 1, (1, 1, 1, 1)),  # few
]
PARTS = {"inverted residual": slice(0, 3), "expansion and taps": slice(0, 2), "taps and projection": slice(1, 3)}


def steps(dtype: torch.dtype, shape: tuple, acts: tuple[Act, Act, Act], part: str = "inverted residual") -> list[Step]:
    """Packed for a plan."""
    _, c, expanded, k, _, _, kernel, stride, padding = shape
    c = expanded if part == "taps and projection" else c
    units = [
        ("pointwise", 1, NO_PADDING, (expanded, c, 1, 1)),
        ("depthwise", stride, padding, (expanded, 1, kernel, kernel)),
        ("pointwise", 1, NO_PADDING, (k, expanded, 1, 1)),
    ]
    made = []
    for (kind, by, zeros, size), act in list(zip(units, acts, strict=True))[PARTS[part]]:
        weight = (torch.randn(size, dtype=torch.float64) / size[1] ** 0.5).to(dtype)
        made.append(InferenceUnit(kind, by, zeros, weight, random_bn(size[0], dtype), act.value, 0.1))
    return steps_of(made, dtype, backends.cpu.pack)


def planned(found: list[Step], x: Tensor, residual: Tensor | None) -> Tensor:
    builder = backends.cpu.PlanBuilder(1 if residual is None else 2)
    out = builder.add_steps(found, 0, None, None if residual is None else 1)
    (y,) = builder.build([out])([x] if residual is None else [x, residual])
    return y


@cases(SHAPES[:3], *SHAPES[3:])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_ops(dtype: torch.dtype, part: str, shape: tuple) -> None:
    n, c, expanded, _, h, w, *_ = shape
    x = activation(n, expanded if part == "taps and projection" else c, h, w, dtype=dtype)
    found = steps(dtype, shape, (Act.RELU6, Act.HARDSWISH, Act.LINEAR), part)
    for residual in (None, activation(*execute(x, found).shape, dtype=dtype)):
        assert torch.equal(planned(found, x, residual), execute(x, found, residual=residual))


@pytest.mark.parametrize("act", Act)
def test_activations(act: Act) -> None:
    shape = SHAPES[1]
    x = activation(3, 24, 57, 53, dtype=torch.float32)
    found = steps(torch.float32, shape, (act, act, act))
    assert torch.equal(planned(found, x, None), execute(x, found))


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_few_images(images: int) -> None:
    """Some are expanded whole, others in bands."""
    for size in (9, 57):
        shape = (images, 24, 72, 24, size, size, 3, 1, (1, 1, 1, 1))
        x = activation(images, 24, size, size, dtype=torch.float32)
        found = steps(torch.float32, shape, (Act.RELU6, Act.RELU6, Act.LINEAR))
        assert torch.equal(planned(found, x, x), execute(x, found, residual=x))


def test_no_images_and_infinite_values() -> None:
    shape = SHAPES[0]
    found = steps(torch.float32, shape, (Act.RELU6, Act.RELU6, Act.LINEAR))
    x = activation(3, 16, 57, 53, dtype=torch.float32)
    assert planned(found, x[:0], None).shape == (0, 24, 29, 27)
    x[0, 3, 5, 7], x[1, 2, 50, 51], x[2, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    y, expected = planned(found, x, None), execute(x, found)
    assert y.isnan().any()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_an_expanded_value_that_is_wanted_is_there() -> None:
    found = steps(torch.float32, SHAPES[0], (Act.RELU6, Act.RELU6, Act.LINEAR))
    x = activation(3, 16, 57, 53, dtype=torch.float32)
    builder = backends.cpu.PlanBuilder(1)
    number = builder.add_steps(found[:1], 0, None, None)
    y, expanded = builder.build([builder.add_steps(found[1:], number, None, None), number])([x])
    assert torch.equal(expanded, execute(x, found[:1]))
    assert torch.equal(y, execute(x, found))


PEAK = """
import resource
import torch
from cpu_ops import activation
from test_cpu_bands import planned, steps
from mobilenet_ext.contract import Act

shape = (32, 16, 96, 24, 112, 112, 3, 2, (1, 1, 1, 1))
found = steps(torch.float32, shape, (Act.RELU6, Act.RELU6, Act.LINEAR))
x = activation(32, 16, 112, 112, dtype=torch.float32)
planned(found, x[:2], None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
planned(found, x, None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_expanded_activations_take_no_memory() -> None:
    """Of 147 MiB, beside an output of 10."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 40 << 10
