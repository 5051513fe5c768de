"""The frozen models of the fuzz, used in every way a model may be used."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fuzz_blocks import draw_blocks
from fuzz_draw import (
    CHANNELS,
    Draw,
    describe,
    draw_chain,
    draw_dtype,
    draw_input,
    draw_network,
    draw_pictures,
    draw_precision,
    sprinkle,
)
from fuzz_judge import Problem
from fuzz_yardstick import Residual
from torch import Tensor, nn

import mobilenet_ext as mx


def draw_frozen(draw: Draw) -> Problem:
    dtype, what = draw_dtype(draw), draw.pick("of", ["chain", "chain", "network", "residual", "blocks"])
    if what == "network":
        model, x = draw_network(draw), draw_pictures(draw, dtype)
    elif what == "blocks":
        model, x = draw_blocks(draw, dtype)
    elif what == "residual":
        c = draw.choice(CHANNELS)
        model = Residual(c, c, bias=draw.chance(0.5))
        x = draw_input(draw, c, dtype)[0]
    else:
        model, x = draw_chain(draw, dtype, plain=0.08)
        if draw.chance(0.3):
            model = nn.Sequential(nn.Identity(), model)
    model.train(draw.chance(0.5))
    ways = [*WAYS, "called", "called"]
    if not isinstance(model, nn.Sequential):
        ways = [way for way in ways if way not in CONTAINER_WAYS]
    elif what == "residual":
        ways = [way for way in ways if way != "sliced"]  # its forward needs both units
    way = draw.pick("way", ways)
    exact_model, autocast, converted = None, None, None
    if way == "converted" and dtype != torch.float64:
        converted = dtype
        exact_model = copy.deepcopy(model)
        for module in exact_model.modules():
            if isinstance(module, WEIGHTED):
                module.weight.data.copy_(module.weight.to(dtype))
    else:
        model, x, autocast = draw_precision(draw, model, x)
    if draw.chance(0.2):
        model = model.to(memory_format=torch.channels_last)
    finite = not draw.chance(0.08)
    if not finite:
        draw.settings["not finite"] = "input"
        sprinkle(draw, x)
    if what != "network":
        draw.settings["model"] = describe(model)
    use, on_plain, k = *WAYS[way], draw.randrange(4)

    def ours(model: nn.Module, x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "freeze found nothing to fold")
            frozen = mx.freeze(model)
            return use(frozen.to(converted) if converted else frozen, x, k)

    def plain(model: nn.Module, x: Tensor) -> Any:
        model.eval()
        if converted and x.dtype == converted:  # not where it is the reference
            for module in model.modules():
                if isinstance(module, WEIGHTED):
                    module.to(converted)
        return on_plain(model, x, k)

    made = Problem(draw.settings, model, x, ours, plain, exact_model, gradients=False, autocast=autocast, finite=finite)
    made.in_eval = True
    made.mode = draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    return made


WEIGHTED = (nn.Conv2d, nn.Linear)


def _call(model: nn.Module, x: Tensor, k: int) -> Tensor:
    return model(x)


def _iterate(model: nn.Sequential, x: Tensor, k: int) -> Tensor:
    for child in model:
        x = child(x)
    return x


def _taps(model: nn.Sequential, x: Tensor, k: int) -> list[Tensor]:
    taps = []
    for i in range(len(model)):
        x = model[i](x)
        taps.append(x.clone())
    return taps


def _slice(model: nn.Sequential, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    first = model[:k](x)
    return first.clone(), model[k:](first)


def _named(model: nn.Sequential, x: Tensor, k: int) -> Tensor:
    for _, child in model.named_children():
        x = child(x)
    return x


def _other_size(model: nn.Module, x: Tensor, k: int) -> Tensor:
    model(torch.cat([x, x]) if len(x) else x)
    return model(x)


def _changed(frozen: nn.Module, x: Tensor, k: int) -> Tensor:
    """Weights are halved after a call that has made its plans of them; then every other tensor is changed."""
    frozen(x)
    tensors = {name: t for name, t in frozen.state_dict().items() if t.is_floating_point()}
    weights = {name for name, t in tensors.items() if t.ndim > 1 and name.rpartition(".")[2].startswith("weight")}
    with torch.no_grad():
        for name in weights:
            tensors[name].mul_(0.5)
    out = frozen(x).clone()
    with torch.no_grad():
        for name in tensors.keys() - weights:
            tensors[name].mul_(1.25)
    with torch.inference_mode(False):  # of inference tensors there would be no plan, nor its bits
        twin = copy.deepcopy(frozen)
    if not torch.equal(frozen(x).nan_to_num(), twin(x).nan_to_num()):
        raise AssertionError("a change in place was not noticed")
    return out


def _halved(model: nn.Module, x: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WEIGHTED):
                module.weight.mul_(0.5)
    return model(x)


def _copied(frozen: nn.Module, x: Tensor, k: int) -> Tensor:
    frozen(x)
    return copy.deepcopy(frozen)(x)


def _pickled(frozen: nn.Module, x: Tensor, k: int) -> Tensor:
    frozen(x)
    return pickle.loads(pickle.dumps(frozen))(x)


def _saved(frozen: nn.Module, x: Tensor, k: int) -> Tensor:
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)


def _frozen_twice(frozen: nn.Module, x: Tensor, k: int) -> Tensor:
    return mx.freeze(frozen)(x)


# What is done with the frozen model, and what with the plain one, which is to give the same.
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "called": (_call, _call),
    "converted": (_call, _call),
    "changed": (_changed, _halved),
    "copied": (_copied, _call),
    "pickled": (_pickled, _call),
    "saved": (_saved, _call),
    "frozen twice": (_frozen_twice, _call),
    "other size before": (_other_size, _call),
    "iterated": (_iterate, _iterate),
    "tapped": (_taps, _taps),
    "sliced": (_slice, _slice),
    "named children": (_named, _named),
}
CONTAINER_WAYS = ("iterated", "tapped", "sliced", "named children")
