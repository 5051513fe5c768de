"""BatchNorm's statistics: what the kernels leave behind of a batch, and how the running statistics move."""

from __future__ import annotations

import copy

import plain
import pytest
import torch
from plain import FORWARD, GRADIENT
from torch import Tensor, nn

import mobilenet_ext as mx

UNITS = {
    "stem": lambda bias=True: mx.nn.StemConvBNReLU(3, 3, bias=bias),
    "depthwise": lambda bias=True: mx.nn.DepthwiseConvBNReLU(3, bias=bias),
    "pointwise": lambda bias=True: mx.nn.PointwiseConvBNReLU(3, 3, bias=bias),
}


@pytest.fixture(params=UNITS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def identity_(unit: nn.Sequential) -> nn.Sequential:
    """Make the convolution of a unit copy its input."""
    weight = unit[0].weight
    with torch.no_grad():
        weight.zero_()
        centre = weight.shape[2] // 2
        for c in range(3):
            weight[c, 0 if weight.shape[1] == 1 else c, centre, centre] = 1
    return unit


def both(kind: str, bias: bool, device: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A fused unit and its plain float64 twin."""
    fused = plain.randomise_(UNITS[kind](bias=bias)).to(device)
    return fused, plain.in_float64(fused, plain.unit(kind, 3, 3, bias=bias))


def check_statistics(fused: nn.Sequential, expected: nn.Sequential) -> None:
    for name in ("running_mean", "running_var"):
        plain.assert_close(getattr(fused[1], name), getattr(expected[1], name), FORWARD, name)
    assert fused[1].num_batches_tracked.item() == expected[1].num_batches_tracked.item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_running_statistics(backend: str, device: str, kind: str, momentum: float | None, bias: bool) -> None:
    fused, expected = both(kind, bias, device)
    fused[1].momentum = expected[1].momentum = momentum
    for size in (7, 6, 9):
        x = torch.randn(2, 3, size, size) + 0.5
        fused(x.to(device))
        expected(x.double())
        check_statistics(fused, expected)


def test_a_conv_bias_reaches_the_running_mean_alone(backend: str, device: str, kind: str) -> None:
    fused, _ = both(kind, True, device)
    x = torch.randn(2, 3, 8, 8, device=device)
    results = []
    for bias in (0.0, 0.25):
        with torch.no_grad():
            fused[0].bias.fill_(bias)
        fused[1].reset_running_stats()
        results.append((fused(x), fused[1].running_mean.clone(), fused[1].running_var.clone()))
    (out, mean, var), (shifted_out, shifted_mean, shifted_var) = results
    plain.assert_close(shifted_out, out.cpu().double(), FORWARD)
    plain.assert_close(shifted_var, var.cpu().double(), FORWARD)
    torch.testing.assert_close(shifted_mean, mean + 0.25 * fused[1].momentum, rtol=0, atol=1e-7)


CANCELLING = {  # without padding, whose pixels have another mean
    "stem": lambda: mx.nn.FusedSequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "depthwise": lambda: mx.nn.FusedSequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
    "pointwise": lambda: mx.nn.FusedSequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
}


def cancelling(kind: str, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """A unit, the mean of whose convolution, 100 at a deviation of 1, the bias takes away; and its input."""
    fused = CANCELLING[kind]()
    conv, bn = fused[0], fused[1]
    taps = conv.weight[0].numel()
    x = (torch.randn(4, conv.in_channels, 12, 12) * taps**0.5 + 100).to(dtype)
    with torch.no_grad():
        conv.weight.copy_(((1 + 0.05 * torch.randn(conv.weight.shape)) / taps).to(dtype))
        raw = nn.functional.conv2d(x.double(), conv.weight.double(), groups=conv.groups)
        conv.bias.copy_(-raw.mean((0, 2, 3)).to(dtype))
        bn.running_var.copy_(raw.var((0, 2, 3)))
    return fused.to(dtype), x


def step_errors(unit: nn.Sequential, x: Tensor, device: str) -> dict[str, float]:
    """The relative errors of a unit's output and gradients."""
    own = nn.Sequential(*copy.deepcopy(unit))
    expected = plain.in_float64(own, copy.deepcopy(own))
    given, given64 = plain.leaf(x.to(device)), plain.as_leaf64(x)
    unit = unit.to(device)
    out = unit(given)
    plain.impose(expected, [out.detach().cpu() > 0], plain.corner(x.dtype))
    wanted = expected(given64)
    upstream = torch.randn(out.shape).to(x.dtype)
    out.backward(upstream.to(out)), wanted.backward(upstream.double())
    gradients = {
        name: (p.grad, q.grad) for (name, p), q in zip(unit.named_parameters(), expected.parameters(), strict=True)
    }
    if unit[1].training:
        del gradients["0.bias"]
    pairs = {"output": (out, wanted), "input": (given.grad, given64.grad), **gradients}
    return {name: plain.relative_error(a, b) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_bias_that_cancels_the_mean(backend: str, device: str, kind: str, training: bool, dtype: torch.dtype) -> None:
    """Rounded without the bias, a convolution's output would lose what the BatchNorm makes large again.

    Of several draws: the large mean of the input has the weight's gradient consist of eight sums of rounding errors."""
    draws = 8
    squares: dict[str, list[float]] = {}
    for _ in range(draws):
        fused, x = cancelling(kind, dtype)
        own = nn.Sequential(*copy.deepcopy(fused))
        errors = [step_errors(unit.train(training), x, where) for unit, where in ((fused, device), (own, "cpu"))]
        for name, ours in errors[0].items():
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += ours**2 / draws
            sums[1] += errors[1][name] ** 2 / draws
    for name, (ours, theirs) in squares.items():
        ours, theirs = ours**0.5, theirs**0.5
        if dtype == torch.float32:
            promise = FORWARD if name == "output" else GRADIENT
            assert ours <= promise, f"{name}: relative error {ours:.2e}, PyTorch's own path has {theirs:.2e}"
        else:
            plain.check_errors(ours, theirs, name)


def test_no_statistics_move_in_eval(backend: str, device: str, kind: str) -> None:
    fused, _ = both(kind, True, device)
    before = [b.clone() for b in fused.buffers()]
    fused.eval()(torch.randn(2, 3, 8, 8, device=device).requires_grad_()).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, fused.buffers(), strict=True))


def test_training_without_gradients_moves_the_statistics(backend: str, device: str, kind: str) -> None:
    fused, expected = both(kind, True, device)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fused(x.to(device))
    expected(x.double())
    check_statistics(fused, expected)


def test_running_statistics_of_16_bits(backend: str, device: str, kind: str) -> None:
    """Buffers of a ``.bfloat16()`` model are rounded once, from an update in float32."""
    fused = plain.randomise_(UNITS[kind]()).to(device).bfloat16()
    own = plain.randomise_(plain.unit(kind, 3, 3)).bfloat16()
    own.load_state_dict({name: t.cpu() for name, t in fused.state_dict().items()})
    expected = plain.in_float64(fused, plain.unit(kind, 3, 3))
    x = (torch.randn(4, 3, 9, 9) + 1).bfloat16()
    fused(x.to(device)), own(x), expected(x.double())
    for name in ("running_mean", "running_var"):
        assert getattr(fused[1], name).dtype == torch.bfloat16
        plain.assert_no_worse(getattr(fused[1], name), getattr(own[1], name), getattr(expected[1], name), name)


def large_mean(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) + 1e4


def variance_errors(kind: str, device: str, batch: int, size: int) -> tuple[float, float]:
    """Ours and ``nn.BatchNorm2d``'s, for a convolution output with mean 1e4 and standard deviation 1."""
    fused = identity_(UNITS[kind](bias=False)).to(device)
    own = nn.BatchNorm2d(3).to(device)
    fused[1].momentum = own.momentum = 1.0
    x = large_mean((batch, 3, size, size))
    fused(x.to(device))
    own(x.to(device))
    expected = x.double().var((0, 2, 3))
    return plain.relative_error(fused[1].running_var, expected), plain.relative_error(own.running_var, expected)


@pytest.mark.parametrize(("batch", "size"), [(2, 3), (3, 17), (8, 56)], ids=str)
def test_variance_survives_a_large_mean(backend: str, device: str, kind: str, batch: int, size: int) -> None:
    ours, theirs = variance_errors(kind, device, batch, size)
    # Closer than that, both are right: the last digits of float32.
    assert ours <= max(theirs, 4 * plain.FLOAT32_UNIT), (
        f"error of the variance {ours:.1e}, of nn.BatchNorm2d {theirs:.1e}"
    )


def test_outputs_and_gradients_survive_a_large_mean(backend: str, device: str, kind: str) -> None:
    """Behind a mean of 1e4 float32 keeps three digits of the deviations, which are then exact: all else follows."""
    fused = identity_(plain.randomise_(UNITS[kind](bias=False))).to(device)
    expected = plain.in_float64(fused, plain.unit(kind, 3, 3, bias=False))
    x = large_mean((4, 3, 12, 12))
    x, x64 = plain.leaf(x.to(device)), plain.as_leaf64(x)
    out = fused(x)
    plain.impose(expected, [out.detach().cpu() > 0], 1e4 * plain.FLOAT32_UNIT)  # as float32 has the mean
    upstream = torch.randn(out.shape)
    out.backward(upstream.to(device))
    wanted = expected(x64)
    wanted.backward(upstream.double())
    # Float32 has the mean itself to 5e-4 of a standard deviation; where that shows, nn.BatchNorm2d is the measure.
    own = nn.BatchNorm2d(3).to(device)
    own.load_state_dict(fused[1].state_dict())
    x_own = plain.leaf(x.detach())
    own_out = torch.where(out > 0, own(x_own), 0)
    own_out.backward(upstream.to(device))
    for name, ours, theirs, exact in (
        ("output", out, own_out, wanted),
        ("input", x.grad, x_own.grad, x64.grad),
        ("gamma", fused[1].weight.grad, own.weight.grad, expected[1].weight.grad),
        ("beta", fused[1].bias.grad, own.bias.grad, expected[1].bias.grad),
    ):
        promised = FORWARD if name == "output" else GRADIENT
        limit = max(promised, plain.SIXTEEN_BITS * plain.relative_error(theirs, exact))
        plain.assert_close(ours, exact, limit, name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_one_value_per_channel(backend: str, device: str, kind: str, training: bool) -> None:
    fused, expected = both(kind, True, device)
    fused.train(training), expected.train(training)
    x = torch.randn(1, 3, 1, 1)
    if not training:
        plain.assert_close(fused(x.to(device)), expected(x.double()), FORWARD)
        return
    with pytest.raises(ValueError) as plain_error:
        expected(x.double())
    with pytest.raises(ValueError) as error:
        fused(x.to(device))
    assert str(error.value) == str(plain_error.value)
    assert torch.equal(fused[1].running_mean.cpu().double(), expected[1].running_mean), "nothing may move on an error"


def test_one_value_per_channel_at_the_end_of_a_chain(backend: str, device: str) -> None:
    """The unit that is refused stands behind one that is not; as in the plain network its statistics may move."""
    fused = mx.MobileNetV1(2, 0.25).to(device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(torch.randn(1, 3, 32, 32, device=device))


def test_two_values_per_channel(backend: str, device: str, kind: str) -> None:
    """The fewest that have a variance: the running one is twice the biased one."""
    fused, expected = both(kind, False, device)
    x = torch.randn(2, 3, 1, 1)
    fused(x.to(device)), expected(x.double())
    check_statistics(fused, expected)


def test_constant_channels(backend: str, device: str, kind: str) -> None:
    """A variance of exactly zero, and not of a rounding error: outputs are beta and gradients are finite."""
    fused = identity_(plain.randomise_(UNITS[kind](bias=False))).to(device)
    fused[1].momentum = 1.0
    x = torch.full((4, 3, 9, 9), 3.0, device=device).requires_grad_()
    out = fused(x)
    assert not fused[1].running_var.any()
    assert torch.equal(out, fused[1].bias.relu().view(1, -1, 1, 1).expand_as(out))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_without_running_statistics(backend: str, device: str, kind: str) -> None:
    """``track_running_stats=False``: the batch's own statistics, in eval too."""
    fused, expected = UNITS[kind]().to(device), plain.unit(kind, 3, 3)
    fused[1], expected[1] = (nn.BatchNorm2d(3, track_running_stats=False).to(d) for d in (device, "cpu"))
    plain.randomise_(fused)
    expected = plain.in_float64(fused, expected)
    x = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        fused.train(training), expected.train(training)
        plain.assert_close(fused(x.to(device)), expected(x.double()), FORWARD)
