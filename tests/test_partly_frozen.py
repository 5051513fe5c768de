"""Networks of which a part learns: what needs no gradient runs as inference, and backward keeps what it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from behaviour import KernelOps, Plain, assert_same_step
from plain import FORWARD, GRADIENT, ReluMasks, assert_close, batch_norms, impose, in_float64, one_thread, randomise_
from plain import Network as PlainNetwork
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mobilenet_ext as mx

UNITS = 7


def features() -> nn.Sequential:
    torch.manual_seed(41)
    return mx.nn.FusedSequential(*randomise_(mx.MobileNetV1(10, 0.25)).double().feature[:UNITS])


def image(n: int = 2) -> Tensor:
    torch.manual_seed(42)
    return torch.randn(n, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def freeze_front(model: nn.Sequential) -> None:
    model[:4].requires_grad_(False).eval()


def freeze_front_in_training(model: nn.Sequential) -> None:
    model[:4].requires_grad_(False)


def freeze_front_of_two_kinds(model: nn.Sequential) -> None:
    """Running statistics, batch statistics and running ones again, none of it learning."""
    model[:5].requires_grad_(False)
    model[:2].eval()
    model[4].eval()


def learn_in_the_middle(model: nn.Sequential) -> None:
    model.requires_grad_(False).eval()
    model[3].requires_grad_(True)


def learn_in_the_middle_in_training(model: nn.Sequential) -> None:
    model.requires_grad_(False)
    model[3].requires_grad_(True)


def learn_batch_norms(model: nn.Sequential) -> None:
    model.requires_grad_(False)
    for bn in batch_norms(model):
        bn.requires_grad_(True)


def learn_batch_norms_behind_a_frozen_front(model: nn.Sequential) -> None:
    learn_batch_norms(model)
    freeze_front(model)


def learn_the_first(model: nn.Sequential) -> None:
    model[1:].requires_grad_(False).eval()


def learn_biases(model: nn.Sequential) -> None:
    """Weights need no gradient and biases of convolutions do, before running and before batch statistics."""
    model.requires_grad_(False)
    for unit in model[2:]:
        unit[0].bias.requires_grad_(True)
    model[:5].eval()


def learn_the_last_bias(model: nn.Sequential) -> None:
    model.requires_grad_(False).eval()
    model[-1][1].bias.requires_grad_(True)


PARTS = [
    freeze_front,
    freeze_front_in_training,
    freeze_front_of_two_kinds,
    learn_in_the_middle,
    learn_in_the_middle_in_training,
    learn_batch_norms,
    learn_batch_norms_behind_a_frozen_front,
    learn_the_first,
    learn_biases,
    learn_the_last_bias,
]
each_part = pytest.mark.parametrize("freeze", PARTS, ids=lambda part: part.__name__)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What backward keeps beyond parameters and buffers, which are there anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)  # noqa: F841  # alive, so that no storage is used twice
        return sum(kept.values())


@each_part
@pytest.mark.parametrize("x_learns", [False, True])
def test_numbers_are_those_of_the_plain_modules(backend64, freeze: Callable, x_learns: bool):
    model = features()
    freeze(model)
    assert_same_step(model, image().requires_grad_(x_learns), units=UNITS)


@each_part
@pytest.mark.parametrize("x_learns", [False, True])
def test_no_more_is_kept_than_by_the_plain_modules(cpu_backend, freeze: Callable, x_learns: bool):
    model = features()
    freeze(model)
    x = image(8).requires_grad_(x_learns)
    ours, plain = kept_bytes(model, x), kept_bytes(Plain(model), x)
    # Beside the activations the chain keeps five statistics per channel where a BatchNorm keeps two.
    statistics = sum(5 * 8 * bn.num_features for bn in batch_norms(model))
    assert ours <= plain + statistics, (ours, plain)


def test_a_frozen_front_keeps_its_output_alone(cpu_backend):
    torch.manual_seed(43)
    model = mx.MobileNetV1(10).feature
    model[:25].requires_grad_(False).eval()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert kept_bytes(model, x) <= kept_bytes(Plain(model), x)
    with KernelOps() as ops:
        model(x)
    forwards = [name for name in ops.names if name.endswith("_forward")]
    assert forwards == ["depthwise_forward", "pointwise_forward", "norm_act_forward"]
    assert ops.names.count("block_inference") == 12


@pytest.mark.parametrize("freeze", [freeze_front_in_training, freeze_front_of_two_kinds])
def test_batch_statistics_that_give_no_gradient_keep_nothing(cpu_backend, freeze: Callable):
    model = features()
    freeze(model)
    x = image(8)
    frozen = sum(not any(p.requires_grad for p in unit.parameters()) for unit in model)
    with torch.no_grad():
        middle = model[:frozen](x)
    # The input of the first unit that learns and the outputs of these: the vectors are small beside them.
    limit = middle.nbytes
    for unit in model[frozen:]:
        with torch.no_grad():
            middle = unit(middle)
        limit += middle.nbytes
    assert kept_bytes(model, x) <= limit + sum(5 * 8 * bn.num_features for bn in batch_norms(model))


def test_batch_norms_alone_keep_no_input(cpu_backend):
    """Nothing that learns depends on the images or on the first weight."""
    model = features()
    learn_batch_norms(model)
    x = image()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)


@each_part
def test_under_no_grad(backend64, freeze: Callable):
    model = features()
    freeze(model)
    with torch.no_grad():
        assert_same_step(model, image(), units=UNITS)
        assert kept_bytes(model, image()) == 0


def test_running_statistics_in_front_run_as_inference_under_no_grad(cpu_backend):
    model = features()
    model[:4].eval()
    with torch.no_grad(), KernelOps() as ops:
        model(image())
    assert ops.names.count("block_inference") == 1 and ops.names.count("depthwise_forward") == 1


@each_part
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend64, freeze: Callable, use_reentrant: bool):
    model = features()
    freeze(model)
    plain, x = Plain(model), image().requires_grad_()
    other = x.detach().clone().requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    plain(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("0.bias"):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert (p.grad is None) == (q.grad is None), name


@pytest.mark.parametrize("freeze", PARTS[:3], ids=lambda part: part.__name__)
def test_autocast(cpu_backend, freeze: Callable):
    """Unit by unit the promise of 16 bits is tested elsewhere; here, that the parts meet in autocast's dtype."""
    model = features().float()
    freeze(model)
    plain, x = Plain(model), image().float()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(x), plain(x)
    assert out.dtype == expected.dtype
    assert_close(out, expected, 0.05, "output")
    out.float().sum().backward()
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad
        assert p.grad is None or p.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(model, x) <= kept_bytes(plain, x)


@pytest.mark.parametrize("freeze", [freeze_front, freeze_front_of_two_kinds, learn_batch_norms])
def test_compile(freeze: Callable):
    torch._dynamo.reset()
    model = features()
    freeze(model)
    twin, x = copy.deepcopy(model), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), twin(x)
    torch.testing.assert_close(out, expected)
    if expected.requires_grad:
        out.square().sum().backward()
        expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [1, 8, 13])
def test_float32_against_float64(backend, device, frozen: int):
    torch.manual_seed(44)
    model = randomise_(mx.MobileNetV1(10, 0.25)).to(device).eval()
    model.feature[:frozen].requires_grad_(False)
    expected = in_float64(model, PlainNetwork(10, 0.25))
    x, masks = torch.randn(2, 3, 64, 64), ReluMasks()
    out = model(x.to(device))
    with masks:  # those of the part that learns; the frozen one stores its activations
        model(x.to(device))
    with torch.no_grad(), one_thread():
        front = expected.feature[:frozen](x.double())
    back = nn.Sequential(*expected.feature[frozen:], *expected.classifier)
    impose(back, masks.masks, FORWARD)
    with one_thread():
        wanted = back(front)
    assert_close(out, wanted, FORWARD, "output")
    upstream = torch.randn(out.shape)
    out.backward(upstream.to(device))
    with one_thread():
        wanted.backward(upstream.double())
    reference = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.requires_grad:
            assert_close(p.grad, reference[name].grad, GRADIENT, name)


@pytest.mark.parametrize("training", [True, False])
def test_a_function_keeps_what_its_gradients_need(backend64, training: bool):
    """Of ``mx.functional``: BatchNorm's vectors learn, the input and the weight do not, and are not kept."""
    x, weight = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(8, 1, 3, 3, dtype=torch.float64)
    gamma, mean, var = torch.ones(8, dtype=torch.float64, requires_grad=True), torch.zeros(8).double(), torch.ones(8)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = mx.functional.depthwise_bn_relu(x, weight, None, mean, var.double(), gamma, None, training=training)
    assert [tuple(t.shape) for t in kept if t.dim() == 4] == [(2, 8, 6, 6)]
    assert kept[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    out.sum().backward()
    assert gamma.grad is not None


@pytest.mark.parametrize("name", ["gamma", "beta", "bias", "weight"])
def test_second_derivatives_are_no_silent_zeros(backend64, name: str):
    """Through what backward does not keep, too: gradients of parameters depend on the others."""
    x, weight = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(8, 1, 3, 3, dtype=torch.float64)
    vectors = {key: torch.rand(8, dtype=torch.float64) + 0.5 for key in ("bias", "mean", "var", "gamma", "beta")}
    tensors = {"weight": weight.to(torch.float32).double(), **vectors}
    leaves = [tensors[key].requires_grad_() for key in {name, "gamma"}]
    out = mx.functional.depthwise_bn_relu(
        *(x, tensors["weight"], tensors["bias"], tensors["mean"], tensors["var"], tensors["gamma"], tensors["beta"])
    )
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves, allow_unused=True)
