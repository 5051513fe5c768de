"""The candidates of ``benchmarks/launch_candidates.py`` are launch parameters as ``heuristics.py`` gives them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.launch_candidates import KERNELS, Candidate, merging
from benchmarks.launch_parameters import cases, replaced
from mobilenet_ext.triton import gpu, heuristics

# Problems of each function, as the kernels call it: with every kind of choice.
PROBLEMS: dict[str, list[tuple[Any, ...]]] = {
    "pointwise_forward": [(50176, 512, 512, 2, False, True, tma, gpu.H100) for tma in (True, False)],
    "pointwise_backward": [
        (50176, k, n, 2, False, True, True, tma, gpu.H100) for k, n in ((512, 512), (64, 128)) for tma in (True, False)
    ],
    "depthwise_forward": [(128, 56, 56, 1, 2, 3, 1, True)],
    "depthwise_backward": [(128, 2, 3)],
    "dense_forward": [(256, 112, 112, 3, 32, 2, gpu.H100)],
    "dense_weight_gradient": [(256, 112, 112, 3, 32, 2, gpu.H100)],
    "block_inference": [(256, 56, 56, 128, 128, 1, 2, gpu.H100)],
    "merge": [(128, 264)],
}


def shape_of(value: Any) -> Any:
    """What there is in a choice, without the numbers; limits of registers and stages may be left out."""
    if isinstance(value, dict):
        return {name: shape_of(each) for name, each in value.items() if name not in ("maxnreg", "num_stages")}
    return type(value)


def shapes_of(choices: Any) -> list[Any]:
    return [shape_of(choice) for choice in (choices if isinstance(choices, tuple) else (choices,))]


def check(candidate: Candidate) -> None:
    for name, function in candidate.replaced.items():
        known = [shape for problem in PROBLEMS[name] for shape in shapes_of(getattr(heuristics, name)(*problem))]
        for problem in PROBLEMS[name]:
            assert all(shape in known for shape in shapes_of(function(*problem))), (name, candidate.parameters)


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates(kernel: str) -> None:
    layers = [case.layer for case in cases([kernel], 1.0, 224)]
    candidates = [candidate for layer in layers for candidate in KERNELS[kernel][2](layer)]
    assert len(candidates) >= 10
    for candidate in candidates:
        check(candidate)


def test_merging() -> None:
    for candidate in merging(None):
        check(candidate)


def test_what_was_replaced_comes_back() -> None:
    before = heuristics.merge
    with replaced({"merge": lambda *_: {}}):
        assert heuristics.merge(1, 1) == {}
    assert heuristics.merge is before
