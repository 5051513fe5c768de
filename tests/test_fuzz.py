"""The fuzz (``tests/fuzz.py``): some of its problems, and that it notices what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_judge import Problem, judge, unwritten
from fuzz_problems import problem
from fuzz_yardstick import Reference, Rounding
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import chain, layers, ops

SEED = 1
COUNTS = {"ops": 60, "modules": 40, "chains": 30, "fused": 2, "frozen": 40}


def complaints(kind: str) -> Iterator[tuple[int, list[str]]]:
    """What is wrong with the problems of a kind."""
    with mx.backends.use("cpu"):
        for index in range(COUNTS[kind]):
            if wrong := judge(problem(SEED, kind, index)):
                yield index, wrong


@pytest.mark.parametrize("kind", COUNTS)
def test_nothing_is_wrong(kind: str) -> None:
    assert list(complaints(kind)) == []


def two_units(channels: int, training: bool) -> nn.Sequential:
    torch.manual_seed(0)
    units = [[nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)] for _ in range(2)]
    return mx.nn.FusedSequential(*units[0], *units[1]).train(training)


def overflowing() -> Problem:
    """Gradients of all sizes around float16's largest, where rounding decides what is Inf."""
    x = torch.randn(2, 8, 40, 40).half().requires_grad_()
    upstream = (torch.randn(2, 8, 40, 40) * 2e4).clamp(-6e4, 6e4).half()
    model = two_units(8, False).half()
    return Problem({}, model, x, lambda model, x: model(x), upstream=lambda i, out: upstream.to(out.dtype) * 2)


def collapsing() -> Problem:
    """Channels that lose all their variance to rounding: gradients grow by 1/sqrt(eps) at each BatchNorm."""
    x = (1000 + torch.randn(2, 8, 5, 5) / 8).bfloat16().requires_grad_()
    model = two_units(8, True).bfloat16()
    return Problem(
        {},
        model,
        x,
        lambda model, x: model(x),
        upstream=lambda i, out: torch.arange(out.numel(), dtype=out.dtype).view(out.shape) % 7 - 3,
    )


@pytest.mark.parametrize("make", [overflowing, collapsing])
def test_what_rounding_explains_is_right(make: Callable[[], Problem]) -> None:
    with mx.backends.use("cpu"):
        assert judge(make()) == []


@pytest.mark.parametrize("wrong", [float("nan"), 0.0], ids=["NaN", "a number"])
def test_overflow_explains_nothing_else(wrong: float) -> None:
    """Where float16 overflows, rounding does not make NaN of Inf, nor a number far from where it overflows."""
    made = overflowing()
    right = made.ours

    def ours(model: nn.Module, x: Tensor) -> Tensor:
        y = x.view_as(x)
        y.register_hook(lambda grad: grad.where(grad.isfinite(), torch.tensor(wrong, dtype=grad.dtype)))
        return right(model, y)

    made.ours = ours
    with mx.backends.use("cpu"):
        assert any("gradient of the input" in told for told in judge(made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_makes_close_values_equal(dtype: torch.dtype) -> None:
    rounding, info = Rounding(dtype, 0), torch.finfo(dtype)
    x = torch.linspace(1.5, 1.5 + 4 * info.eps, 1001, dtype=torch.float64)
    rounded = rounding.off(x, dtype)
    assert 4 <= len(rounded.unique()) <= 5 and (rounded - x).abs().max() <= info.eps / 2
    assert torch.equal(rounding.off(-x, dtype).sign(), -x.sign())


def test_rounding_overflows() -> None:
    x = torch.tensor([0.0, 60000.0, 66000.0, -66000.0, torch.inf, torch.nan], dtype=torch.float64)
    rounded = Rounding(torch.float16, 0).off(x, torch.float16)
    assert rounded.isinf().tolist() == [False, False, True, True, True, False]
    assert rounded[0] == 0 and rounded[3] < 0 and rounded[5].isnan()


def test_a_sum_rounds_though_its_terms_cancel() -> None:
    reference = Reference(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)))
    reference.start(None, Rounding(torch.float32, 0))
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64).expand(2, 3, 5, 5)
    upstream = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    reference.model(x).backward(torch.cat([upstream, -upstream]))
    ((_, module, name),) = reference.slots
    noise = getattr(module, name).grad.abs().max().item() / torch.finfo(torch.float32).eps
    assert 0.1 < noise < 100


def test_equal_terms_of_a_sum_round_alike() -> None:
    """Of flat images, whose sums cancel, the partial sums' roundoff is left, and it has one sign."""
    reference = Reference(nn.Sequential(nn.BatchNorm2d(16)))
    reference.start(None, Rounding(torch.float32, 0))
    flat = torch.linspace(0.1, 0.2, 16, dtype=torch.float64).view(1, 16, 1, 1).expand(1, 16, 40, 40)
    upstream = torch.cat([-3 * flat, flat, flat, flat])
    reference.model(torch.randn(4, 16, 40, 40, dtype=torch.float64)).backward(upstream)
    noise = reference.model[0].module.bias.grad.abs().amax().item() / torch.finfo(torch.float32).eps
    assert 1e3 < noise < 1e5  # with errors of the terms alone it is 10


class ReadsWhatNobodyWrote(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(x.shape)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer fills memory itself")
def test_what_nobody_wrote_is_told_from_what_is_wrong() -> None:
    x = torch.zeros(1, 8, 16, 16)
    written = Problem({}, nn.Sequential(nn.Conv2d(8, 8, 1)), x, lambda model, x: model(x))
    assert unwritten(written) == set()
    written.model.append(ReadsWhatNobodyWrote())
    assert unwritten(written) == {"output"}


def test_a_problem_is_a_function_of_its_number() -> None:
    first, again = (problem(SEED, "chains", 5) for _ in range(2))
    assert first.settings == again.settings and first.threads == again.threads
    torch.testing.assert_close(first.x, again.x, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(problem(SEED + 1, "chains", 5).x.flatten()[:1], first.x.flatten()[:1])


def scaled(factor: float, output: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes of an op one with a result that is a little too large."""

    def plant(op: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any) -> Any:
            out = op(*args)
            if output is None:
                return out * factor
            return tuple(o * factor if i == output else o for i, o in enumerate(out))

        return wrong

    return plant


def one_element(op: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of an op one that forgets the last element of its result."""

    def wrong(*args: Any) -> Tensor:
        out = op(*args).clone()
        out[-1:, -1:, -1:, -1:] = 0
        return out

    return wrong


def overflowed(op: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any) -> Tensor:
        out = op(*args).clone()
        out[-1:, -1:, -1:, -1:] = torch.inf
        return out

    return wrong


def of_threads(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: op(*args) * (1 + 1e-7 * (torch.get_num_threads() > 1))


def without_nan(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: op(*args).nan_to_num(0)


PLANTED = {
    "an output off by 1e-3": (ops, "norm_act_forward", scaled(1 + 1e-3), "chains"),
    "an output off by 3e-5": (ops, "norm_act_forward", scaled(1 + 3e-5), "modules"),
    "a gradient off by 1e-3": (ops.BACKWARD, "pointwise", scaled(1 + 1e-3, 1), "modules"),
    "a layer's gradient off by 1e-3": (ops.BACKWARD, "depthwise", scaled(1 + 1e-3, 0), "ops"),
    "one element forgotten": (ops.INFERENCE, "depthwise", one_element, "ops"),
    "one element overflowed": (ops.INFERENCE, "depthwise", overflowed, "ops"),
    "the biased variance as the running one": (
        chain,
        "update_running_stats_",
        lambda op: lambda *args: op(*args[:4], [10**9] * len(args[4]), args[5]),
        "modules",
    ),
    "a convolution without its bias": (ops.FORWARD, "pointwise", lambda op: lambda *args: op(*args[:10]), "modules"),
    "bits that depend on the threads": (ops, "norm_act_forward", of_threads, "modules"),
    "NaN lost": (ops.INFERENCE, "pointwise", without_nan, "ops"),
    "statistics that are not differentiable": (
        layers,
        "_split_grad",
        lambda op: lambda *args: (op(*args)[0], torch.zeros_like(op(*args)[1]), *op(*args)[2:]),
        "ops",
    ),
    "a frozen model off by 1e-3": (chain, "execute", scaled(1 + 1e-3), "frozen"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, plant, kind = PLANTED[fault]
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, plant(place[name]))
    else:
        monkeypatch.setattr(place, name, plant(getattr(place, name)))
    assert next(complaints(kind), None)


BROKEN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import fuzz, fuzz_problems

right = fuzz_problems.problem

def problem(seed, kind, index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    made = right(seed, kind, index)
    if index == 3:
        made.ours = lambda model, x: 1 / 0
    return made

fuzz_problems.problem = problem
sys.exit(fuzz.main())
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script), "--problems=5", "--only=ops", "--isa=baseline", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "--problem ops:1 --isa baseline --seed 1  # the process died: SIGSEGV" in done.stdout
    assert "--problem ops:3 --isa baseline --seed 1  # raised ZeroDivisionError" in done.stdout
    assert done.stdout.endswith("\n5 problems, 2 wrong\n")
