"""Launch parameters of the Triton kernels, to be timed beside each other by ``launch_parameters.py``: all sizes of
blocks that fit, numbers of warps, of pipeline stages and of programs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.network import Layer
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.gpu import Gpu
from mobilenet_ext.triton.heuristics import Config, cdiv, config, programs

REGISTERS = 65536  # of a multiprocessor


class Candidate(NamedTuple):
    """Parameters by name, and the functions of ``heuristics`` that they replace, with what these return then."""

    parameters: dict[str, Any]
    replaced: dict[str, Callable[..., Any]]


def _grid(**choices: tuple) -> Iterator[Any]:
    """Every combination, as a namespace."""
    for values in itertools.product(*choices.values()):
        choice = argparse.Namespace(**dict(zip(choices, values, strict=True)))
        if "waves" in choices and not {"registers", "elements"} & choices.keys():
            choice.registers = heuristics.registers(choice.warps, choice.waves)
        yield choice


def _pointwise_forward(c: Any) -> dict[str, Callable[..., Any]]:
    def replacement(
        rows: int, channels: int, outputs: int, itemsize: int, ieee: bool, norm: bool, tma: bool, gpu: Gpu
    ) -> tuple[Config]:
        whole = channels <= c.K
        constants = {"STAGES": c.stages} if c.tma else {"WHOLE_K": whole, "FOLD": whole}
        kernel = config(
            c.warps, 1 if c.tma else c.stages, maxnreg=c.registers, BLOCK_M=c.M, BLOCK_N=c.N, BLOCK_K=c.K, **constants
        )
        count = programs(cdiv(rows, c.M), cdiv(outputs, c.N), gpu.multiprocessors, c.waves)
        return ({"PROGRAMS": count, "STORED_A": c.stored and norm, "TMA": c.tma, "kernel": kernel},)

    return {"pointwise_forward": replacement}


def pointwise_on_load(layer: Layer) -> Iterator[Candidate]:
    """Normalised on load."""
    k, n = layer.in_channels, layer.out_channels
    for c in _grid(
        M=(64, 128),
        N=(64, 128, 256),
        K=(32, 64, 128),
        warps=(4, 8),
        stages=(1, 3, 4),
        waves=(1, 2, 3, 4),
        stored=(False,),
        tma=(False,),
    ):
        whole = k <= c.K
        if c.N > n or c.K > max(32, k) or whole != (c.stages == 1) or not _fits(c) or c.M * c.N // c.warps < 1024:
            continue
        if c.warps == 8 and c.M * c.N < 128 * 128:  # both halves of the warps would normalise the same rows
            continue
        yield Candidate(vars(c), _pointwise_forward(c))


def pointwise_stored(layer: Layer) -> Iterator[Candidate]:
    """Normalised, and stored, before the product; in inference there is nothing to normalise."""
    k, n = layer.in_channels, layer.out_channels
    for c in _grid(
        M=(64, 128, 256), N=(128, 256), K=(64, 128), warps=(4, 8), stages=(1, 3, 4, 5), waves=(1, 2, 3), stored=(True,),
        tma=(False,),
    ):  # fmt: skip
        if c.N > n or c.K > max(32, k) or (k <= c.K) != (c.stages == 1) or not _fits(c):
            continue
        yield Candidate(vars(c), _pointwise_forward(c))


def pointwise_tma(layer: Layer) -> Iterator[Candidate]:
    """With operands copied by TMA (``hopper.py``), on Hopper."""
    k, n = layer.in_channels, layer.out_channels
    for c in _grid(
        M=(128, 256), N=(64, 128, 256), K=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4, 5), waves=(1, 2),
        registers=(255,), stored=(True, False), tma=(True,),
    ):  # fmt: skip
        shared = (c.stages * (c.M + c.N) * c.K + c.M * c.N) * 2
        if c.N > n or c.K > k or c.waves * shared > 220 * 1024 or c.M * c.N // (c.warps * 32) > 128:
            continue
        if c.waves * c.warps <= 8:
            yield Candidate(vars(c), _pointwise_forward(c))


def _fits(c: Any) -> bool:
    """The stages in shared memory, the accumulators in registers, the programs on a multiprocessor."""
    shared = c.stages * (c.M + c.N) * c.K * 2
    return (
        shared <= 220 * 1024
        and c.waves * shared <= 220 * 1024
        and 32 <= c.M * c.N // (c.warps * 32) <= 128
        and c.waves * c.warps <= 16
    )


def _backward(choose: Callable[..., dict[str, Any]]) -> dict[str, Callable[..., Any]]:
    """The heuristics' parameters, of which ``choose`` changes some: from (rows, channels, outputs, processors)."""
    original = heuristics.pointwise_backward

    def replacement(rows, channels, outputs, itemsize, ieee, need_input, need_weight, tma, gpu):
        both = original(rows, channels, outputs, itemsize, ieee, need_input, need_weight, tma, gpu)[-1]
        return ({**both, **choose(rows, channels, outputs, gpu.multiprocessors)},)

    return {"pointwise_backward": replacement}


def _input(c: Any, **constants: Any) -> Callable[..., dict[str, Any]]:
    def choose(rows: int, channels: int, outputs: int, processors: int) -> dict[str, Any]:
        columns = cdiv(channels, c.K)
        kernel = config(c.warps, c.stages, maxnreg=c.registers, BLOCK_M=c.M, BLOCK_N=c.N, BLOCK_K=c.K, **constants)
        count = programs(cdiv(rows, c.M), columns, processors, c.waves)
        return {"STORED_DY": c.stored, "input": {"PROGRAMS": count, "TMA": c.tma, "kernel": kernel}}

    return choose


def pointwise_input(layer: Layer) -> Iterator[Candidate]:
    k = layer.in_channels
    for c in _grid(
        M=(64, 128), N=(32, 64, 128), K=(64, 128, 256), warps=(4, 8), stages=(3, 4), waves=(1, 2, 3),
        stored=(True, False), tma=(False,),
    ):  # fmt: skip
        shared = c.stages * (c.M * c.N * (1 if c.stored else 2) + c.N * c.K) * 2
        accumulators = c.M * c.K // (c.warps * 32)
        if c.K > k or c.waves * shared > 220 * 1024 or not 32 <= accumulators <= 128 or c.waves * c.warps > 16:
            continue
        if c.stored == (c.N == 32) or (not c.stored and (c.M == 256 or c.stages > 4)):
            continue
        yield Candidate(vars(c), _backward(_input(c, WHOLE_N=False, FOLD=False)))


def pointwise_weight(layer: Layer) -> Iterator[Candidate]:
    k, n = layer.in_channels, layer.out_channels
    for c in _grid(
        M=(32, 64, 128), N=(128, 256), K=(64, 128, 256), warps=(4, 8), stages=(3, 4), waves=(1, 2),
        stored=(True, False),
    ):  # fmt: skip
        shared = c.stages * c.M * (c.N + c.K) * 2
        accumulators = c.N * c.K // (c.warps * 32)
        if c.N > n or c.K > k or c.waves * shared > 220 * 1024 or not 64 <= accumulators <= 128:
            continue
        if c.waves * c.warps > 16:
            continue

        def choose(rows: int, channels: int, outputs: int, processors: int, c=c) -> dict[str, Any]:
            kernel = config(c.warps, c.stages, maxnreg=c.registers, BLOCK_M=c.M, BLOCK_N=c.N, BLOCK_K=c.K)
            blocks = cdiv(outputs, c.N) * cdiv(channels, c.K)
            count = programs(cdiv(rows, c.M), blocks, processors, c.waves)
            return {"weight": {"PROGRAMS": count, "STORED_A": c.stored, "TMA": False, "kernel": kernel}}

        yield Candidate(vars(c), _backward(choose))


def pointwise_one_pass(layer: Layer) -> Iterator[Candidate]:
    k, n = layer.in_channels, layer.out_channels
    if k * n > 128 * 256:
        return
    for c in _grid(M=(16, 32, 64), warps=(4, 8), stages=(2, 3, 4), waves=(1, 2, 4), stored=(False,), tma=(False,)):
        c.N, c.K = (max(32, size) for size in (n, k))
        shared = (c.stages * c.M * (2 * c.N + c.K) + c.N * c.K) * 2
        accumulators = (c.N + c.M) * c.K // (c.warps * 32)
        if shared > 200 * 1024 or accumulators > 176 or c.waves * c.warps > 16:
            continue
        one_pass = _input(c, WHOLE_N=True, FOLD=False)
        yield Candidate(vars(c), _backward(lambda *a, one_pass=one_pass: {**one_pass(*a), "weight": None}))


def backward_tma(layer: Layer) -> Iterator[Candidate]:
    """Both gradients apart, or in one pass where the whole weight fits, with operands copied by TMA."""
    k, n = layer.in_channels, layer.out_channels

    def kernel(shape: tuple[int, ...], rows: int, blocks: int, processors: int) -> dict[str, Any]:
        m, n, k, warps, stages, waves = shape
        chosen = config(warps, maxnreg=255, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, STAGES=stages)
        return {"PROGRAMS": programs(cdiv(rows, m), blocks, processors, waves), "TMA": True, "kernel": chosen}

    for c in _grid(
        M=(64, 128), N=(32, 64, 128, 256), K=(32, 64, 128, 256), warps=(4, 8), stages=(1, 2, 3, 4), waves=(1, 2),
        part=("input", "weight", "weight stored", "both"),
    ):  # fmt: skip
        operands, accumulators = {
            "input": (c.stages * (c.M + c.K) * c.N + c.M * c.K, c.M * c.K),
            "both": ((c.stages * (2 * c.N + c.K) + 2 * c.K) * c.M + c.N * c.K, (c.M + c.N) * c.K),
        }.get(c.part, (c.stages * c.M * (c.N + c.K), c.N * c.K))
        if c.K > k or c.N > n or 2 * c.waves * operands > 225 * 1024 or c.waves * c.warps > 8:
            continue
        if accumulators // (c.warps * 32) > 128 or (c.part == "both" and (c.N < n or c.K < k)):
            continue
        if (c.part == "both") != (k <= 128 and n <= 128):  # as the heuristics choose
            continue
        if (c.part != "both" and c.stages == 1) or (c.part != "input" and c.N < 64):
            continue

        def choose(rows: int, channels: int, outputs: int, processors: int, c=c) -> dict[str, Any]:
            shape = (c.M, c.N, c.K, c.warps, c.stages, c.waves)
            if c.part == "both":
                return {"STORED_DY": False, "input": kernel(shape, rows, 1, processors), "weight": None}
            by_input = shape if c.part == "input" else heuristics.TMA_INPUT
            by_weight = shape if c.part != "input" else heuristics.TMA_WEIGHT
            blocks = cdiv(channels, by_weight[2])
            weight = kernel(by_weight, rows, blocks * cdiv(outputs, by_weight[1]), processors)
            return {
                "STORED_DY": True,
                "input": kernel(by_input, rows, cdiv(channels, by_input[2]), processors),
                "weight": {**weight, "STORED_A": c.part == "weight stored"},
            }

        yield Candidate(vars(c), _backward(choose))


def _depthwise(layer: Layer, heuristic: str, columns: tuple[int, ...], **choices: tuple) -> Iterator[Candidate]:
    """``columns``: of a lane, where the kernel leaves them open. ``elements``: of a thread in a column, with the
    registers that it may have."""
    for c in _grid(columns=columns, C=(32, 64, 128), **choices):
        elements, registers = c.elements
        if c.C > max(16, layer.in_channels) or c.C == 32 < layer.in_channels:
            continue
        if registers * 32 * c.warps * c.waves > REGISTERS:
            continue
        constants = {"STAGES": c.stages}
        if c.columns:
            exact = heuristics.lanes_are_full(layer.size, layer.out_size, 1, 3, layer.stride, c.columns)
            constants.update(COLUMNS=c.columns, EXACT=exact)
        kernel = config(c.warps, maxnreg=registers, BLOCK_P=c.warps * 32 * elements // c.C, BLOCK_C=c.C, **constants)
        chosen = {"waves": c.waves, "kernel": kernel}
        yield Candidate(vars(c), {heuristic: lambda *problem, chosen=chosen: (chosen,)})


def depthwise_forward(layer: Layer) -> Iterator[Candidate]:
    columns = (2, 4) if layer.stride == 1 else (1, 2)
    elements = ((8, 255), (4, 255), (4, 168), (4, 128))
    yield from _depthwise(
        layer, "depthwise_forward", columns, elements=elements, warps=(2, 4), waves=(2, 3, 4, 6, 8), stages=(3, 4)
    )


def depthwise_inference(layer: Layer) -> Iterator[Candidate]:
    columns = (2, 4) if layer.stride == 1 else (1, 2)
    elements = ((8, 255), (4, 168), (4, 128))
    yield from _depthwise(
        layer, "depthwise_forward", columns, elements=elements, warps=(2, 4), waves=(0,), stages=(4, 8)
    )


def depthwise_backward(layer: Layer) -> Iterator[Candidate]:
    elements = ((4, 255), (2, 168), (2, 128))
    yield from _depthwise(
        layer, "depthwise_backward", (0,), elements=elements, warps=(2, 4), waves=(2, 3, 4, 6), stages=(3, 4)
    )


def dense_forward(layer: Layer) -> Iterator[Candidate]:
    for c in _grid(pixels=(32, 64, 128), warps=(2, 4, 8), registers=(96, 128, 168, 255), waves=(4, 8, 12, 16)):

        def replacement(images, height, width, channels, filters, itemsize, gpu, c=c) -> tuple[Config]:
            h, w = heuristics.rectangle(c.pixels, height, width)
            kernel = config(c.warps, maxnreg=c.registers, BLOCK_H=h, BLOCK_W=w, BLOCK_N=32, BLOCK_K=32)
            tiles = images * cdiv(height, h) * cdiv(width, w)
            return (
                {
                    "PROGRAMS": programs(tiles, cdiv(filters, 32), gpu.multiprocessors, c.waves // c.warps),
                    "kernel": kernel,
                },
            )

        if c.waves >= c.warps and c.pixels >= 16 * c.warps / 2 and c.registers * 32 * c.waves <= 2 * REGISTERS:
            yield Candidate(vars(c), {"dense_forward": replacement})


def dense_backward(layer: Layer) -> Iterator[Candidate]:
    for c in _grid(pixels=(16, 32, 64, 128), warps=(1, 2, 4), waves=(8, 16, 24, 32), registers=(255,)):

        def replacement(images, height, width, channels, filters, itemsize, gpu, c=c) -> tuple[Config]:
            h, w = heuristics.rectangle(c.pixels, height, width)
            kernel = config(c.warps, BLOCK_H=h, BLOCK_W=w, BLOCK_N=32, BLOCK_K=32)
            tiles = images * cdiv(height, h) * cdiv(width, w)
            return ({"PROGRAMS": programs(tiles, 1, gpu.multiprocessors, c.waves // c.warps), "kernel": kernel},)

        if c.waves >= c.warps:
            yield Candidate(vars(c), {"dense_weight_gradient": replacement})


def block_inference(layer: Layer) -> Iterator[Candidate]:
    yield Candidate({"two": True}, {"block_inference": lambda *args: (heuristics.TWO_KERNELS,)})
    for c in _grid(H=(4, 8), W=(8, 16), N=(64, 128, 256), C=(32,), warps=(4, 8), registers=(168, 255)):
        if c.N > layer.out_channels or c.H * c.W * c.N // (c.warps * 32) > 128 or c.registers * c.warps > 1024:
            continue
        if layer.in_channels > 256:
            continue
        kernel = config(c.warps, maxnreg=c.registers, BLOCK_H=c.H, BLOCK_W=c.W, BLOCK_N=c.N, BLOCK_C=c.C)
        yield Candidate(vars(c), {"block_inference": lambda *args, kernel=kernel: (kernel,)})


class Merge(NamedTuple):
    """A merging kernel's problem: as many rows of partial results as programs left, of a layer's size."""

    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"merge {self.rows}x{self.columns}"


def merging(_: Any) -> Iterator[Candidate]:
    for c in _grid(P=(4, 8, 16, 32, 64, 128, 256), C=(4, 8, 16, 32, 64, 128, 256, 512), warps=(1, 2, 4, 8)):
        if 1 <= c.P * c.C // (c.warps * 32) <= 32:
            chosen = config(c.warps, BLOCK_P=c.P, BLOCK_C=c.C)
            yield Candidate(vars(c), {"merge": lambda columns, rows, chosen=chosen: chosen})


# A kernel: the kind of layer and the pass that it belongs to, and its candidates.
KERNELS: dict[str, tuple[str, str, Callable[[Layer], Iterator[Candidate]]]] = {
    "pointwise_forward_on_load": ("pointwise", "forward", pointwise_on_load),
    "pointwise_forward_stored": ("pointwise", "forward", pointwise_stored),
    "pointwise_forward_tma": ("pointwise", "forward", pointwise_tma),
    "pointwise_backward_input": ("pointwise", "backward", pointwise_input),
    "pointwise_backward_weight": ("pointwise", "backward", pointwise_weight),
    "pointwise_backward_one_pass": ("pointwise", "backward", pointwise_one_pass),
    "pointwise_backward_tma": ("pointwise", "backward", backward_tma),
    "depthwise_forward": ("depthwise", "forward", depthwise_forward),
    "depthwise_backward": ("depthwise", "backward", depthwise_backward),
    "dense_forward": ("dense", "forward", dense_forward),
    "dense_backward": ("dense", "backward", dense_backward),
    "pointwise_inference": ("pointwise", "inference", pointwise_stored),
    "depthwise_inference": ("depthwise", "inference", depthwise_inference),
    "block_inference": ("block", "inference", block_inference),
}


MERGES = [Merge(rows, columns) for rows in (16, 66, 132, 264, 528) for columns in (32, 128, 512, 1024)]
GRADIENT_MERGES = [Merge(4, 1024 * 1024), Merge(16, 512 * 512), Merge(33, 256 * 256), Merge(264, 128 * 128)]
