"""Frozen models with CUDA graphs, recorded on the CPU (``recorded_graph``): bit for bit what they give without."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from plain import randomise_
from recorded_graph import Graph, recorded
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import backends, cuda_graph, frozen_graphs


@pytest.fixture
def graphs() -> Iterator[list[Graph]]:
    # Of ops, which the recorder sees; the backend `cpu` runs a plan in one call.
    with backends.use("reference"), recorded() as graphs:
        yield graphs


def network() -> nn.Module:
    return randomise_(mx.MobileNetV1(5, 0.125)).eval()


def images(n: int = 2, size: int = 33) -> Tensor:
    return torch.randn(n, 3, size, size)


class Both:
    """A model frozen with graphs, and without."""

    def __init__(self, model: nn.Module | None = None) -> None:
        model = network() if model is None else model
        self.graphed, self.plain = mx.freeze(model, cuda_graph=True), mx.freeze(model)

    def __call__(self, x: Tensor) -> Tensor:
        """Asserts that they agree."""
        out, expected = self.graphed(x), self.plain(x)
        assert torch.equal(out, expected)
        assert (out.stride(), out.dtype, out.is_inference()) == (
            expected.stride(),
            expected.dtype,
            expected.is_inference(),
        )
        assert out.requires_grad == expected.requires_grad
        return out

    def change(self, how: Callable[[nn.Module], object]) -> None:
        for model in (self.graphed, self.plain):
            how(model)


def replays(graphs: list[Graph]) -> list[int]:
    return [graph.replays for graph in graphs]


def test_the_second_call_captures(graphs: list[Graph]) -> None:
    both = Both()
    outputs = [both(images()) for _ in range(4)]
    assert replays(graphs) == [3]
    assert len({out.data_ptr() for out in outputs}) == 4 and not torch.equal(outputs[2], outputs[3])


def test_kinds_of_inputs(graphs: list[Graph]) -> None:
    both = Both()
    inputs = [
        images(),
        images().contiguous(memory_format=torch.channels_last),
        images(3),
        images(size=40),
        images().double(),
    ]
    for _ in range(3):
        for x in inputs[:-1]:
            both(x)
        with torch.autocast("cpu", torch.bfloat16):
            both(inputs[0])
        with torch.inference_mode():
            both(inputs[0])
            both(images())
    assert replays(graphs) == [8, 2, 2, 2, 2]  # in inference mode it is the same graph


def test_only_the_last_kinds_are_kept(graphs: list[Graph]) -> None:
    both = Both()
    for n in range(1, frozen_graphs.KEPT + 3):
        both(images(n)), both(images(n))
    assert len(both.graphed.plans._graphs._kept) == frozen_graphs.KEPT
    captured = len(graphs)
    both(images(1)), both(images(frozen_graphs.KEPT))
    assert len(graphs) == captured and graphs[frozen_graphs.KEPT - 1].replays == 2


def test_inputs_that_a_graph_does_not_take(graphs: list[Graph]) -> None:
    both = Both()
    for _ in range(3):
        both(images(1).expand(2, -1, -1, -1))
        both(images(0))
        both(images().requires_grad_())
    assert replays(graphs) == []
    with pytest.raises(Exception, match="mat|conv|channels|input"):
        both.graphed(torch.randn(2, 4, 33, 33))
    with pytest.raises(TypeError, match="NoneType"):
        both.graphed(None)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "values": lambda model: model.feature[0][0].weight.mul_(1.5),
    "values of the last layer": lambda model: model.classifier[1].bias.add_(1),
    "a state dict": lambda model: model.load_state_dict(randomise_(mx.MobileNetV1(5, 0.125)).state_dict()),
    "address": lambda model: setattr(model.feature[3][0].weight, "data", model.feature[3][0].weight * 2),
    "a parameter": lambda model: setattr(model.classifier[1], "bias", nn.Parameter(torch.ones(5), requires_grad=False)),
    "a module": lambda model: model.feature[4].__setitem__(2, nn.Tanh()),
    "dtype and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(graphs: list[Graph], name: str) -> None:
    both, x = Both(), images()
    before = [both(x) for _ in range(3)][-1]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    both.change(lambda model: (torch.set_rng_state(state), CHANGES[name](model)))
    after = [both(x) for _ in range(5)]
    assert not torch.equal(before, after[0])
    assert len(graphs) == 2 and graphs[1].replays >= 3


def test_memory_that_comes_back(graphs: list[Graph]) -> None:
    """Weights that are swapped through ``.data`` have their version, and then their address, again: a graph that still
    holds reads folded weights, which are therefore still there."""
    both, x = Both(), images()
    weight = both.graphed.feature[3][0].weight
    first, second = weight.data, weight.data * 2
    outputs = []
    for values in (first, second) * 4:
        for model in (both.graphed, both.plain):
            model.feature[3][0].weight.data = values
        outputs.append([both(x) for _ in range(4)][-1])
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_hooks_see_every_call(graphs: list[Graph]) -> None:
    both, seen = Both(), []
    both(images()), both(images()), both(images())
    handle = both.graphed.feature[7].register_forward_hook(lambda *_: seen.append(1))
    for n in range(1, 4):
        both(images())
        assert len(seen) == n
    handle.remove()
    for _ in range(4):
        both(images())
    assert len(seen) == 3 and len(graphs) == 2


def test_weights_that_change_at_every_call_are_seldom_captured(graphs: list[Graph]) -> None:
    both, x = Both(), images()
    for _ in range(40):
        both(x)
        both.change(lambda model: model.classifier[1].bias.add_(1))
    assert len(graphs) <= 5


def test_who_follows_is_shown_the_operations(graphs: list[Graph]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    both, x = Both(), images()
    for _ in range(3):
        both(x)
    counts = []
    for model in (both.graphed, both.plain):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    traced = torch.jit.trace(both.graphed, x, check_trace=False)
    assert torch.allclose(traced(x), both.plain(x), atol=1e-5)
    assert replays(graphs) == [2]


def test_parameters_that_need_gradients_get_them(graphs: list[Graph]) -> None:
    model = nn.Sequential(mx.nn.FusedSequential(mx.nn.DepthwiseConvBNReLU(3), nn.Conv2d(3, 4, 1, 2)))
    both = Both(randomise_(model).eval())
    both(images()), both(images())
    both.change(lambda model: model[0][1].requires_grad_())
    out = both(images())
    assert out.requires_grad
    with torch.no_grad():
        both(images())
    assert replays(graphs) == [2]


def test_the_outermost_containers_have_the_graphs(graphs: list[Graph]) -> None:
    model = nn.Sequential(mx.nn.DepthwiseSeparableConv(3, 8), nn.Tanh(), mx.nn.DepthwiseSeparableConv(8, 4))
    both = Both(randomise_(model).eval())
    for _ in range(3):
        both(images())
    assert replays(graphs) == [2, 2]
    part = both.graphed[0][:1]
    x = images()
    assert torch.equal(torch.stack([part(x) for _ in range(3)]), torch.stack([both.plain[0][:1](x) for _ in range(3)]))


def test_copies_start_empty(graphs: list[Graph]) -> None:
    both, x = Both(), images()
    for _ in range(3):
        both(x)
    twin = copy.deepcopy(both.graphed)
    assert twin.plans._graphs is not both.graphed.plans._graphs and not twin.plans._graphs._kept
    twin.classifier[1].bias.add_(1)
    assert torch.allclose(twin(x), both(x) + 1)


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if float(x.sum()) > 0 else 2)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(("module", "why"), [(Waiting(), "when stream is capturing"), (Pair(), "no tensor, but tuple")])
def test_what_cannot_be_captured_runs_as_it_is_and_that_is_said_once(
    graphs: list[Graph], module: nn.Module, why: str
) -> None:
    frozen = mx.freeze(mx.nn.FusedSequential(mx.nn.DepthwiseConvBNReLU(3), module), cuda_graph=True)
    x = images()
    first = frozen(x)
    with pytest.warns(UserWarning, match=f"a frozen model runs without CUDA graphs: .*{why}"):
        frozen(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = frozen(x)
    assert all(map(torch.equal, again, first))


def test_a_second_thread_does_not_wait(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    both, x = Both(), images()
    for _ in range(3):
        both(x)
    inside, go_on, outputs = threading.Event(), threading.Event(), []
    replay = Graph.replay

    def slowly(graph: Graph) -> None:
        inside.set()
        assert go_on.wait(60)
        replay(graph)

    monkeypatch.setattr(Graph, "replay", slowly)

    def call() -> None:
        with backends.use("reference"):
            outputs.append(both.graphed(x))

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    outputs.append(both.graphed(x))
    go_on.set()
    thread.join()
    assert torch.equal(*outputs) and graphs[0].replays == 3


def test_another_capture_goes_through_it(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    both, x = Both(), images()
    for _ in range(3):
        both(x)
    monkeypatch.setattr(cuda_graph, "is_capturing", lambda: True)
    both(x)
    assert replays(graphs) == [2]


def test_nothing_changes_on_a_cpu() -> None:
    both, x = Both(), images()
    for _ in range(3):
        both(x)
    assert not both.graphed.plans._graphs._kept


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_the_argument(value: object) -> None:
    with pytest.raises(TypeError, match=f"cuda_graph: expected True or False, got {value!r}"):
        mx.freeze(network(), cuda_graph=value)
