"""Launch parameters, in one place: from a problem's shape to the blocks, warps and pipeline stages of a kernel.

Each function returns the keyword arguments of a launch: the kernel's block sizes (``BLOCK_*`` and other compile-time
constants) and Triton's own options. Blocks are powers of two.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton import next_power_of_2

from mobilenet_ext.triton.gpu import Gpu

Config = dict[str, Any]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. ``triton.cdiv`` is the same on the host, but goes through Triton's wrappers: 4 us a call, four
    hundred times in a training step."""
    return -(-a // b)


def config(num_warps: int, num_stages: int = 1, **constants: int | bool | str) -> Config:
    # Multiply-adds are fused whatever the default of this Triton: the rounding does not depend on its version.
    return {**constants, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _at_most(block: int, size: int) -> int:
    """``block``, smaller for few channels; not below 32, so that kernels for narrow networks do not multiply."""
    return min(block, max(32, next_power_of_2(size)))


@cache
def merge(columns: int, programs: int) -> Config:
    """For merging ``programs`` rows of partial results of ``columns`` columns: of channels few per program, so that
    many programs run, with many rows in flight at once; of a weight's gradient enough for long accesses. Few sizes,
    because a kernel is compiled for each."""
    if columns >= 2**18:
        return config(num_warps=4, BLOCK_P=8, BLOCK_C=256)
    if columns >= 2**14:
        return config(num_warps=8, BLOCK_P=16, BLOCK_C=64)
    return config(num_warps=1, BLOCK_P=16, BLOCK_C=4) if programs <= 16 else config(8, BLOCK_P=128, BLOCK_C=4)


def registers(num_warps: int, waves: int) -> int:
    """The most that a thread can have where ``waves`` programs are to run on a multiprocessor at once. Without a limit
    ptxas would rather use all of them than have more programs."""
    return min(255, 65536 // (32 * num_warps * waves) // 8 * 8)


def programs(tiles: int, columns: int, multiprocessors: int, waves: int) -> int:
    """How many programs share ``tiles`` in each of ``columns`` columns of the grid: about ``waves`` per multiprocessor
    in all, each with as many tiles as the others where that can be."""
    most = max(1, waves * multiprocessors // columns)
    return cdiv(tiles, cdiv(tiles, most)) if tiles else 0


@cache
def norm_act(rows: int, channels: int, itemsize: int, multiprocessors: int) -> tuple[Config, ...]:
    """For normalising and activating a [rows, channels] matrix, forward and backward: 16 elements per thread."""
    candidates = []
    for columns, elements in ((64, 4096), (64, 2048), (128, 4096)):
        block_c = min(columns, max(32, next_power_of_2(channels)))
        block_m = elements // block_c
        kernel = config(num_warps=elements // 512, maxnreg=128, BLOCK_M=block_m, BLOCK_C=block_c)
        count = programs(cdiv(rows, block_m), cdiv(channels, block_c), multiprocessors, 16384 // elements)
        candidates.append({"PROGRAMS": count, "kernel": kernel})
    return tuple(candidates)


@cache
def norm_act_pool(
    images: int, pixels: int, channels: int, itemsize: int, multiprocessors: int
) -> tuple[Config, ...]:  # fmt: skip
    """For the pooling's [images, pixels, channels]: up to 64 pixels of an image at once."""
    candidates = []
    for columns, rows in ((64, 64), (32, 64), (128, 32)):
        block_c = min(columns, next_power_of_2(channels))
        block_m = min(rows, next_power_of_2(pixels))
        kernel = config(num_warps=max(1, min(8, block_m * block_c // 512)), BLOCK_M=block_m, BLOCK_C=block_c)
        count = programs(images * cdiv(pixels, block_m), cdiv(channels, block_c), multiprocessors, 4)
        candidates.append({"PROGRAMS": count, "kernel": kernel})
    return tuple(candidates)


def lanes_are_full(width: int, out_width: int, pad_left: int, size: int, stride: int, columns: int) -> bool:
    """Whether an image is as wide as a depthwise convolution's output, times the stride, and each lane of ``columns``
    outputs has all of them: then the usual padding is all there is (``EXACT``)."""
    return pad_left == size // 2 and out_width * stride == width and out_width % columns == 0


@cache
def depthwise_forward(
    channels: int, width: int, out_width: int, pad_left: int, itemsize: int, size: int, stride: int, stats: bool
) -> tuple[Config, ...]:
    """``waves``: the programs per multiprocessor, where the number matters because each leaves statistics.

    A lane of four columns (of two with stride 2) normalises an input for fewer neighbours than one of two, and with
    four channels per thread leaves registers for three programs, where no padding but the usual one needs some. Without
    statistics eight channels are as fast. A 5x5 convolution has two channels per thread: with four, 25 taps each are
    100 registers.
    """

    def tile(elements: int, warps: int, waves: int, registers: int, columns: int, most_channels: int = 64) -> Config:
        exact = lanes_are_full(width, out_width, pad_left, size, stride, columns)
        lane = {"COLUMNS": columns, "EXACT": exact, "STAGES": 4 if size == 3 else 3}
        return _depthwise(channels, elements, warps, waves * stats, most_channels, maxnreg=registers, **lane)

    if size == 5:
        columns = 2 if stride == 1 else 1
        return tile(2, 4, 2, 255, columns, 128), tile(2, 8, 1, 255, columns, 128)
    columns = 4 if stride == 1 else 2
    four, eight = tile(4, 4, 2, 255, columns), tile(8, 4, 2, 255, columns, 64 if stats else 128)
    if itemsize == 4:
        return four, tile(2, 4, 4, 128, columns)
    if not stats:
        return eight, four
    if four["kernel"]["EXACT"]:
        four = tile(4, 4, 3, 168, columns)
    return four, eight


@cache
def depthwise_backward(channels: int, itemsize: int, size: int) -> tuple[Config, ...]:
    """Tiles of four channels per thread: with eight the registers do not suffice, at 5x5 with more than two, and in
    float32 with two not on every GPU."""
    if size == 5:
        two, one = _depthwise(channels, 2, 4, 2), _depthwise(channels, 1, 4, 2)
        one["kernel"]["maxnreg"] = 255  # as forward
        return (one, two) if itemsize == 4 else (two, one)
    shapes = ((4, 2, 4), (4, 4, 2), (2, 4, 3))
    return tuple(_depthwise(channels, *shape, 64, STAGES=4) for shape in shapes)


def _depthwise(
    channels: int, elements: int, num_warps: int, waves: int, most_channels: int = 128, **constants: int
) -> Config:
    """A tile of ``elements`` per thread, without a rest of channels where 16 divide them."""
    block_c = min(most_channels, max(16, next_power_of_2(channels)))
    while block_c > 16 and channels % block_c and channels % 16 == 0:
        block_c //= 2
    kernel = config(num_warps, BLOCK_P=num_warps * 32 * elements // block_c, BLOCK_C=block_c, **constants)
    return {"waves": waves, "kernel": kernel}


GRID_Y = 65535  # programs that a launch can have in its second dimension


@cache
def depthwise_grid(
    images: int, channels: int, height: int, lanes: int, multiprocessors: int, tile: tuple[int, int], waves: int
) -> tuple[int, int]:
    """(rows, programs): the rows a tile walks down at a time, and the programs for a block of channels, where an image
    has ``height`` rows of ``lanes``.

    Chunks of rows give the programs work of even size, at the price of two more rows to load in each. ``waves``: only
    as many programs as run at once, because each leaves a row of partial results; 0: as many as there is work for.
    """
    block_p, block_c = tile
    blocks, strips = -(-channels // block_c), -(-images * lanes // block_p)
    rows = height
    while rows > 1 and blocks * strips * -(-height // rows) < (12 if rows > 8 else 2) * multiprocessors:
        rows = (rows + 1) // 2
    tasks = strips * -(-height // rows)
    return rows, min(tasks, max(1, waves * multiprocessors // blocks) if waves else GRID_Y)


@cache
def rectangle(pixels: int, height: int, width: int) -> tuple[int, int]:
    """The rectangle of ``pixels`` pixels, a power of two, of which the fewest cover an image; of equals, the widest."""
    shapes = [(pixels >> bits, 1 << bits) for bits in reversed(range(pixels.bit_length()))]
    return min(shapes, key=lambda shape: cdiv(height, shape[0]) * cdiv(width, shape[1]))


@cache
def dense_forward(
    images: int, height: int, width: int, channels: int, filters: int, itemsize: int, gpu: Gpu
) -> tuple[Config, ...]:  # fmt: skip
    """For a dense convolution, forward: ``height`` x ``width`` output pixels, 9*``channels`` products for each filter.

    float32 products take their operands from registers, where they need smaller blocks.
    """
    # pixels; warps, registers, programs per multiprocessor
    block_n = _at_most(64 if itemsize == 2 else 32, filters)
    block_k = 16 if itemsize == 4 or 9 * channels <= 32 else 64
    candidates = []
    # 168 registers per thread leave room for three programs of four warps on a multiprocessor; they do not suffice for
    # all 27 products of an RGB image at once.
    shapes = [(64, 4, 255, 3), (64, 8, 255, 1)] if itemsize == 4 else [(64, 4, 168, 3), (32, 4, 128, 3)]
    if gpu.is_hopper and itemsize == 2 and block_n <= 32:
        block_k = max(32, block_k)
    for pixels, warps, registers, waves in shapes:
        block_h, block_w = rectangle(pixels, height, width)
        tiles = images * cdiv(height, block_h) * cdiv(width, block_w)
        kernel = config(
            num_warps=warps, maxnreg=registers, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_N=block_n, BLOCK_K=block_k
        )
        count = programs(tiles, cdiv(filters, block_n), gpu.multiprocessors, waves)
        candidates.append({"PROGRAMS": count, "kernel": kernel})
    return tuple(candidates)


@cache
def dense_weight_gradient(
    images: int, height: int, width: int, channels: int, filters: int, itemsize: int, gpu: Gpu
) -> tuple[Config, ...]:  # fmt: skip
    """For the gradient of its weight: as ``dense_forward``, with the pixels as the products' inner dimension."""
    block_n = _at_most(64 if itemsize == 2 else 32, filters)
    block_k = max(16, min(64 if itemsize == 2 else 32, next_power_of_2(9 * channels)))
    candidates = []
    if itemsize == 4:
        shapes = [(32, 4, 4), (16, 2, 8)]
    elif gpu.is_hopper and block_n <= 32:
        shapes = [(16, 4, 6), (32, 4, 4)]
    else:
        shapes = [(64, 4, 4), (32, 4, 4), (32, 2, 8)]
    for pixels, warps, waves in shapes:
        block_h, block_w = rectangle(pixels, height, width)
        tiles = images * cdiv(height, block_h) * cdiv(width, block_w)
        kernel = config(num_warps=warps, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_N=block_n, BLOCK_K=block_k)
        blocks = cdiv(filters, block_n) * cdiv(9 * channels, block_k)
        candidates.append({"PROGRAMS": programs(tiles, blocks, gpu.multiprocessors, waves), "kernel": kernel})
    return tuple(candidates)


@cache
def dense_input_gradient(height: int, width: int, channels: int, filters: int, itemsize: int) -> Config:
    """For the gradient of its input, of ``height`` x ``width`` pixels."""
    block_h, block_w = rectangle(64, height, width)
    block_c = max(16, min(32, next_power_of_2(channels)))
    block_n = max(16, min(64 if itemsize == 2 else 16, next_power_of_2(filters)))
    return config(num_warps=4, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, BLOCK_N=block_n)


TWO_KERNELS: Config = {}  # a choice of block_inference: the depthwise kernel, then the pointwise one


@cache
def block_inference(
    images: int, height: int, width: int, channels: int, filters: int, stride: int, itemsize: int, gpu: Gpu
) -> tuple[Config, ...]:  # fmt: skip
    """For a block of ``height`` x ``width`` output pixels in one kernel, or in two.

    Two are faster (by 1.1 to 1.5 on an H200, for every block of a MobileNetV1 at batch 256), but for a problem so small
    that a launch counts: there one kernel pays, where one program computes all outputs of its pixels and has few
    channels to go through.
    """
    # rows and columns of pixels, outputs, channels; warps, registers. Nearly square: a tile shares its border of inputs
    # with others. Few sizes, because a kernel is compiled for each; widths below 1 leave a part of them unused.
    small = (4, 8, 64, 16 if itemsize == 4 else 32, 4, 168)
    if itemsize == 4:
        shapes = [(8, 8, 64, 16, 4, 255), small]
    elif filters > 128:
        shapes = [(8, 16, 256, 32, 8, 255), (8, 8, 128, 32, 8, 128), small]
    elif filters > 64:
        shapes = [(8, 8, 128, 32, 8, 128), (8, 8, 64, 32, 4, 168), small]
    else:
        shapes = [(8, 8, 64, 32, 4, 168), small]
    tiles = images * cdiv(height, shapes[0][0]) * cdiv(width, shapes[0][1])
    small_problem = tiles * cdiv(filters, shapes[0][2]) < 2 * gpu.multiprocessors
    if small_problem:
        shapes = [shapes[-1], *shapes[:-1]]  # more programs, each with less to do
    candidates = [
        config(num_warps=warps, maxnreg=registers, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_N=block_n, BLOCK_C=block_c)
        for block_h, block_w, block_n, block_c, warps, registers in shapes
    ]
    return (*candidates, TWO_KERNELS) if small_problem and channels <= 64 else (TWO_KERNELS, *candidates)


# A product's block: rows, outputs, channels; warps, stages, programs per multiprocessor.
Shape = tuple[int, int, int, int, int, int]


@cache
def pointwise_forward(
    rows: int, channels: int, outputs: int, itemsize: int, ieee: bool, normalised: bool, tma: bool, gpu: Gpu
) -> tuple[Config, ...]:
    """For the product of [rows, channels] with [channels, outputs], where there are many more rows than columns.

    ``ieee``: float32 products on the FMA units, whose operands are in registers: smaller blocks. ``normalised``: the
    rows are to be normalised; on Hopper, with many channels, they are, and stored, before the product (``STORED_A``).
    That was measured with ReLU: an activation that costs more may pay for the pass over the data with fewer channels.
    """
    stored: list[Shape] = []
    if itemsize == 4:
        on_load = [(64, 128, 32, 8, 3, 2), (64, 64, 32, 8, 2, 2)][0 if outputs > 64 else 1 :]
        if ieee:
            on_load = [(32, 64, 16, 8, 2, 2)]
    elif not gpu.is_hopper:
        on_load = [(64, 128, 64, 8, 3, 2), (128, 128, 64, 8, 3, 2), (64, 64, 64, 4, 3, 4)]
        if channels <= 64:
            on_load = [(64, 128, 64, 8, 1, 2), (64, 64, 64, 8, 1, 2)]
            if outputs <= 64:
                on_load = [(64, 64, 64, 4, 1, 4) if channels <= 32 else (64, 64, 64, 8, 1, 2)]
    elif normalised:
        if channels <= 64:
            on_load = [(128, 64, 64, 4, 1, 2), (64, 64, 64, 4, 1, 2)]
        elif channels <= 128:
            on_load = [(64, 64, 128, 4, 1, 2), (64, 64, 64, 4, 3, 2)]
        else:
            on_load = [(128, 64, 64, 4, 3, 2), (64, 64, 64, 4, 3, 2)]
            stored = [(64, 128, 64, 4, 4, 2)]
    elif channels <= 32:
        on_load = [(128, 64, 32, 4, 1, 2), (64, 64, 32, 4, 1, 2)]
    elif channels <= 128:
        on_load = [(64, 128, 128, 8, 1, 2), (64, 64, 64, 4, 3, 2)]
    else:
        on_load = [(128, 128, 64, 8, 4, 1), (64, 128, 64, 8, 3, 2), (64, 64, 64, 4, 3, 2)]
    choices = [(shape, False) for shape in on_load]
    storing = [(shape, True) for shape in stored]
    choices = [*storing, *choices] if channels > 256 else [*choices[:1], *storing, *choices[1:]]
    first, _ = choices[0]
    small = cdiv(rows, first[0]) * cdiv(outputs, first[1]) < gpu.multiprocessors
    if small:
        choices = [choices[-1], *choices[:-1]]  # more programs, each with less to do
    candidates = []
    for (block_m, block_n, block_k, warps, stages, waves), stored_a in choices:
        block_n, block_k = _at_most(block_n, outputs), _at_most(block_k, channels)
        whole = channels <= block_k and not ieee
        kernel = config(
            num_warps=warps, num_stages=1 if whole else stages,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, WHOLE_K=whole, FOLD=whole,
            **_limit(itemsize, ieee, gpu, warps, waves),
        )  # fmt: skip
        count = programs(cdiv(rows, block_m), cdiv(outputs, block_n), gpu.multiprocessors, waves)
        candidates.append({"PROGRAMS": count, "STORED_A": stored_a, "TMA": False, "kernel": kernel})
    if tma and channels >= 64 and outputs >= 64:
        by_tma = []
        for shape, stored_a in _forward_tma(channels, outputs, normalised):
            count = programs(cdiv(rows, shape[0]), cdiv(outputs, shape[1]), gpu.multiprocessors, shape[5])
            by_tma.append({"PROGRAMS": count, "STORED_A": stored_a, "TMA": True, "kernel": _tma_kernel(shape)})
        candidates = [*candidates, *by_tma] if small else [*by_tma, *candidates]
    return tuple(candidates)


def _forward_tma(channels: int, outputs: int, normalised: bool) -> list[tuple[Shape, bool]]:
    """Blocks for operands copied by TMA (``hopper.py``), and whether a normalised one is stored before the product."""
    narrow = (128, 128 if outputs > 64 else 64, 32, 4, 4, 2)
    wide = (128, 256, 64, 8, 3, 1)
    if not normalised:
        return [(narrow, False)]
    if outputs <= 128 or cdiv(outputs, 128) % 2:  # half of a wide block would be empty
        return [(narrow, channels > 256), (narrow, channels <= 256)]
    return [(narrow, True), (wide, False)] if channels > 256 else [(wide, False), (narrow, False)]


def _tma_kernel(shape: Shape) -> Config:
    block_m, block_n, block_k, warps, stages, _ = shape
    return config(warps, maxnreg=255, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages)


def _limit(itemsize: int, ieee: bool, gpu: Gpu, num_warps: int, waves: int) -> Config:
    """The limit of registers of a product."""
    if ieee or num_warps == 4:  # ptxas would rather spill a few registers than have fewer programs
        return {"maxnreg": 255}
    return {"maxnreg": registers(num_warps, waves)} if gpu.is_hopper and itemsize == 2 else {}


@cache
def pointwise_backward(
    rows: int, channels: int, outputs: int, itemsize: int, ieee: bool, need_input: bool, need_weight: bool, tma: bool,
    gpu: Gpu,
) -> tuple[Config, ...]:  # fmt: skip
    """For the gradients of input and weight: in one pass over the data where a program can hold all of dW, else apart.

    Before sm_90 (with less shared memory than that has) tensor cores take both operands from registers, and the weight
    in them leaves less room.
    """
    stored_dy = False
    # Of the weight's gradient, each with whether a normalised operand is stored before the product: ``by_weight``.
    if itemsize == 4:
        by_input = (32, 16, 64, 8, 2, 2) if ieee else (64, 32, 64, 8, 3, 2)
        by_weight = [((32, 64, 64, 8, 2, 2), False)]
        one_pass = [] if ieee else [(32, 64, 32, 8, 2, 1)]
    elif gpu.is_hopper:
        stored_dy = True
        by_input = (64, 64, 64, 4, 4, 2)
        by_weight = [((64, 256, 128, 8, 3, 1), False)]
        if channels > 256:
            by_weight = [((64, 128, 256, 8, 4, 1), True), *by_weight]
        one_pass = [(16, 64, 32, 4, 3, 4), (32, 128, 64, 4, 3, 2), (32, 128, 128, 8, 3, 1)]
    else:
        by_input = (64, 32, 128, 8, 3, 2)
        by_weight = [((32, 128, 128, 8, 3, 2), False)]
        one_pass = [(64, 32, 32, 8, 2, 1), (64, 64, 32, 4, 2, 2)]
        if gpu.shared_memory > 200 * 1024:
            one_pass += [(64, 128, 64, 8, 2, 1), (16, 128, 128, 8, 5, 1)]

    def kernel(shape: Shape, **constants: int | bool | str) -> Config:
        block_m, block_n, block_k, warps, stages, waves = shape
        block_n, block_k = _at_most(block_n, outputs), _at_most(block_k, channels)
        columns = cdiv(channels, block_k) * (1 if "WHOLE_N" in constants else cdiv(outputs, block_n))
        return {
            "PROGRAMS": programs(cdiv(rows, block_m), columns, gpu.multiprocessors, waves),
            "TMA": False,
            "kernel": config(
                num_warps=warps, num_stages=stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **constants,
                **({"maxnreg": 255} if ieee else {}),
            ),
        }  # fmt: skip

    candidates = []
    if need_input and need_weight:
        for shape in one_pass:
            if outputs <= shape[1] and channels <= shape[2]:
                both = kernel(shape, WHOLE_N=True, FOLD=False)
                candidates.append({"STORED_DY": False, "input": both, "weight": None})
                break
    for shape, stored_a in by_weight if need_weight else by_weight[:1]:
        candidates.append({
            "STORED_DY": stored_dy and need_input,  # for the weight alone the pass was not measured to pay
            "input": kernel(by_input, WHOLE_N=False, FOLD=False) if need_input else None,
            "weight": {**kernel(shape), "STORED_A": stored_a} if need_weight else None,
        })  # fmt: skip
    if tma:
        return (*_backward_tma(rows, channels, outputs, need_input, need_weight, gpu), *candidates)
    return tuple(candidates)


# Blocks of the two kernels for Hopper, where they are apart.
TMA_INPUT: Shape = (128, 64, 128, 8, 4, 1)
TMA_WEIGHT: Shape = (64, 256, 128, 8, 4, 1)


def _backward_tma(
    rows: int, channels: int, outputs: int, need_input: bool, need_weight: bool, gpu: Gpu
) -> list[Config]:
    """The same with operands copied by TMA (``hopper.py``)."""

    def kernel(shape: Shape, columns: int) -> Config:
        count = programs(cdiv(rows, shape[0]), columns, gpu.multiprocessors, shape[5])
        return {"PROGRAMS": count, "TMA": True, "kernel": _tma_kernel(shape)}

    if not need_input or outputs < 64 or cdiv(rows, 128) < gpu.multiprocessors:
        return []
    if need_weight and outputs <= 128 and channels <= 128:
        if channels > 64:
            one_pass = (64, 128, 128, 8, 3, 1)
        elif channels > 32 or outputs > 64:
            one_pass = (64, 128, 64, 4, 2, 2)
        else:
            one_pass = (128, 64, 32, 4, 2, 2)
        return [{"STORED_DY": False, "input": kernel(one_pass, 1), "weight": None}]
    if channels < 64:
        return []
    weight = None
    if need_weight:
        blocks = cdiv(channels, TMA_WEIGHT[2]) * cdiv(outputs, TMA_WEIGHT[1])
        weight = {**kernel(TMA_WEIGHT, blocks), "STORED_A": channels > 256}
    return [{"STORED_DY": True, "input": kernel(TMA_INPUT, cdiv(channels, TMA_INPUT[2])), "weight": weight}]
