"""The machine code of every kernel launch of the network, and of depthwise 5x5 convolutions, for five architectures of
GPUs; no GPU is needed.

Compiled is what the heuristics choose at 224x224, for batches of 256 to 1: training forward and backward, eval with
gradients (on one GPU), and frozen inference; in plain runs for one GPU the widest network in bfloat16, in ``slow`` ones
four widths and all dtypes for it, and for the others the widest and the narrowest network. Launches are recorded: a new
kernel or a new choice needs no entry here.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import machine_code
import planted_kernels
import torch
from machine_code import ARCHITECTURES, Architecture, CompiledLaunch, Launch
from plain import WIDTHS
from sass import loses_nan, narrow, spilled
from triton import knobs

import mobilenet_ext as mx
from mobilenet_ext.contract import Act
from mobilenet_ext.files import locked

if knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

# Other batches choose the same launch parameters, which a test checks: recording is quick, compiling is not.
BATCHES = (256, 1)
OTHER_BATCHES = (1024, 128, 32)
# dtype and float32 precision setting. bfloat16 stands for both 16-bit types, whose launch parameters are the same; on
# one architecture float16 is compiled as well, at one width, and float32 without tensor cores.
NUMBERS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"))
FLOAT16, IEEE = (torch.float16, "ieee"), (torch.float32, "ieee")
TENSOR_CORES = {80: "HMMA.*", 86: "HMMA.*", 90: "HGMMA.*", 100: "UTC.*MMA.*", 120: "HMMA.*"}
Kernels = list[tuple[Launch, CompiledLaunch]]
# The networks that are compiled: in numbers of which kind, and how wide. One GPU is compiled for in plain runs, all of
# them are in slow ones, this one for all kinds of kernels.
FIRST = "sm_90"
Networks = tuple[tuple[tuple[torch.dtype, str], float], ...]
ONE: Networks = ((NUMBERS[0], 1.0),)
SOME: Networks = tuple(product(NUMBERS, (WIDTHS[0], WIDTHS[-1])))
ALL: Networks = (*product((*NUMBERS, IEEE), WIDTHS), (FLOAT16, 1.0))
Case = tuple[Architecture, Networks]
CASES = [
    *(pytest.param((a, ONE), id=f"{a.name}-one network") for a in ARCHITECTURES if a.name == FIRST),
    *(pytest.param((a, ALL if a.name == FIRST else SOME), id=a.name, marks=pytest.mark.slow) for a in ARCHITECTURES),
]


def record(architecture: Architecture, networks: Networks, batches: tuple[int, ...] = BATCHES) -> dict[str, Launch]:
    """The different launches of the networks on a GPU of this architecture."""
    launches: dict[str, Launch] = {}
    all_kinds = networks == ALL
    precision = torch.backends.cudnn.conv.fp32_precision
    try:
        with torch.device("meta"), machine_code.recording(architecture, launches):
            for ((dtype, setting), width), batch in product(networks, batches):
                torch.backends.cudnn.conv.fp32_precision = setting
                network = mx.MobileNetV1(1000, width, conv_bias=False).to(dtype)
                images = torch.empty(batch, 3, 224, 224, dtype=dtype)
                network(images).sum().backward()
                with torch.no_grad():
                    mx.freeze(network)(images)
                if (dtype, setting) in NUMBERS and width == 1:
                    mx.MobileNetV1(1000).to(dtype)(images)
                    network.feature[:3](images).sum().backward()  # a chain that ends without pooling
                    for stride in (1, 2) if all_kinds else (1,):
                        record_5x5(dtype, batch, stride)
                    if all_kinds:
                        network.eval()(images).sum().backward()  # the same kernels without statistics
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    return launches


def record_5x5(dtype: torch.dtype, batch: int, stride: int) -> None:
    """The depthwise convolutions that the network has not."""
    ops, padding = torch.ops.mobilenet_ext, [2, 2, 2, 2]
    u, y = (torch.empty(batch, 240, 28 // s, 28 // s, dtype=dtype) for s in (1, stride))
    bn, grad_bn, weight = torch.empty(5, 240), torch.empty(6, 240), torch.empty(240, 1, 5, 5, dtype=dtype)
    u, y = (x.to(memory_format=torch.channels_last) for x in (u, y))
    ops.depthwise_forward(u, bn, Act.RELU, weight, stride, padding, bn[0], bn[1], 1e-5, True)
    ops.depthwise_inference(u, bn, Act.RELU, weight, stride, padding)
    ops.depthwise_backward(y, y, grad_bn, u, bn, Act.RELU, True, weight, stride, padding, True, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this run of the tests: workers of pytest-xdist share it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, machine_code.use_cache, (str(folder / "triton"),)) as pool:
        yield pool


@pytest.fixture(scope="module")
def compiled(
    workers: ProcessPoolExecutor, folder: Path, capsys_disabled: Callable[[str], None]
) -> Callable[[Case], Kernels]:
    """Compiles for an architecture when a test of the run first asks for it."""

    @cache
    def compiled_for(case: Case) -> Kernels:
        architecture, networks = case
        kept = folder / f"{architecture.name}-{len(networks)}.pickle"
        with locked(folder / f"{kept.stem}.lock", wait=True):
            if not kept.is_file():
                start, launches = time.perf_counter(), record(*case).values()
                codes = workers.map(partial(machine_code.compile_launch, architecture=architecture), launches)
                kept.write_bytes(pickle.dumps(list(zip(launches, codes, strict=True))))
                seconds = time.perf_counter() - start
                capsys_disabled(f"\n{len(launches)} for {kept.stem} compiled in {seconds:.0f} s")
        return pickle.loads(kept.read_bytes())

    return compiled_for


@pytest.fixture(scope="module")
def capsys_disabled(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print past pytest's capture: how long compiling takes is worth a line."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    return show


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def architecture(case: Case) -> Architecture:
    return case[0]


@pytest.fixture
def kernels(compiled: Callable[[Case], Kernels], case: Case) -> Kernels:
    return compiled(case)


def no_tensor_cores(launch: Launch, code: CompiledLaunch, capability: int) -> str | None:
    """What is wrong with the products of a kernel: each wants the best instruction that its tile allows."""
    for kind, m, n, k in code.dots:
        if kind == "f32" and launch.names.get("PRECISION") == "ieee":
            continue
        # Hopper's and Blackwell's instructions are for a group of four warps and 64 rows.
        whole = m >= 64 and launch.options.get("num_warps", 4) % 4 == 0
        wanted = TENSOR_CORES[capability] if whole else "HMMA.*|" + TENSOR_CORES[capability]
        if not code.matching(wanted):
            return f"no {wanted} for {m}x{n}x{k} in {kind}"
    return None


def check(kernels: Kernels, find: Callable[[Launch, CompiledLaunch], str | None]) -> None:
    assert kernels
    wrong = [f"{launch}: {what}" for launch, code in kernels if (what := find(launch, code))]
    assert not wrong, f"{len(wrong)} of {len(kernels)} kernels:\n" + "\n".join(wrong)


def named(kernels: Kernels, part: str) -> Kernels:
    return [(launch, code) for launch, code in kernels if part in launch.module]


# Launch parameters were measured in bfloat16, in training, without biases, and what was measured spills nothing. These
# are the variants of it that do (float16, without batch statistics, with a bias), by the blocks of the kernel on sm_90,
# and bytes of the stack. All are compiled where all kinds are; the plain run, of what was measured, allows only a bias.
KNOWN_TO_SPILL = {
    ("pointwise_backward", "_input", 32, 128, 128): 40,
    ("pointwise_backward", "_input", 32, 128, 64): 144,
    ("pointwise_forward", "_kernel", 128, 64, 64): 8,
    ("hopper_forward", "_kernel", 128, 256, 64): 120,
    ("hopper_forward", "_kernel", 128, 128, 32): 72,
    ("dense_backward", "_weight_kernel", 1, 16, 32, 32): 8,
    ("depthwise_forward", "_kernel", 8, 64): 8,
    ("dense_forward", "_kernel", 4, 16, 32, 32): 8,
}


def known_to_spill(launch: Launch) -> int:
    blocks = [size for name, size in launch.names.items() if name.startswith("BLOCK_")]
    return KNOWN_TO_SPILL.get((launch.module.rpartition(".")[2], launch.kernel, *blocks), 0)


def has_bias(launch: Launch) -> bool:
    return launch.signature.get("bias_ptr", "constexpr") != "constexpr"


def test_nothing_is_kept_in_local_memory(kernels, case: Case) -> None:
    _, networks = case

    def found(launch: Launch, code: CompiledLaunch) -> str | None:
        if (networks == ALL or has_bias(launch)) and code.stack <= known_to_spill(launch) and not code.local:
            return None
        return spilled(code)

    check(kernels, found)


def test_other_batches_choose_the_same_kernels(case: Case) -> None:
    assert record(*case, OTHER_BATCHES).keys() <= record(*case).keys()


def test_shared_memory_is_enough(kernels, architecture: Architecture) -> None:
    limit = architecture.gpu.shared_memory
    check(kernels, lambda launch, code: f"{code.shared} bytes of {limit}" if code.shared > limit else None)


def test_no_maximum_loses_a_nan(kernels) -> None:
    check(kernels, lambda launch, code: loses_nan(code))
    assert any(code.matching(r"FMNMX.*\.NAN.*") for _, code in kernels)


def test_kernels_use_all_that_they_are_given(kernels) -> None:
    """Triton's compiler can drop a variable that a loop hands on, and what it was computed from; the interpreter
    does not. (The kernel that merges gradients has two halves, and may be given work for one.)"""
    unused = {str(launch): code.unused for launch, code in kernels if code.unused and launch.kernel != "_gradients"}
    assert not unused


def test_depthwise_kernels_move_128_bits_at_once(kernels) -> None:
    """In 16 bits it is 64 where a thread has four channels, as in float32: backward, since with the eight of 128 bits
    it would need more than the 255 registers that there are, and spill 592 bytes; and where that was measured to be
    faster. At 5x5 a thread has fewer channels: 32 bits."""
    for part in ("depthwise_forward", "depthwise_backward"):
        wide = [(launch, code) for launch, code in named(kernels, part) if launch.names["UNIT"] == 8]
        check(wide, lambda launch, code: narrow(code, 8 * channels_of_a_thread(launch) * itemsize(launch)))


def test_depthwise_kernels_copy_rows_ahead(kernels) -> None:
    """Triton leaves a loop as it is, without a word, where it cannot tell how to load ahead in it."""
    ahead = [(launch, code) for launch, code in kernels if "STAGES" in launch.names and "depthwise" in launch.module]
    check(ahead, lambda launch, code: None if any("LDGSTS" in op for op in code.in_loops) else "no LDGSTS in a loop")


def channels_of_a_thread(launch: Launch) -> int:
    return launch.names["BLOCK_P"] * launch.names["BLOCK_C"] // (32 * launch.options["num_warps"])


def itemsize(launch: Launch) -> int:
    return 4 if launch.signature["u_ptr"] == "*fp32" else 2


def test_products_run_on_tensor_cores(kernels, architecture: Architecture) -> None:
    for part in ("pointwise_forward", "pointwise_backward", "dense_forward", "dense_backward", "block_inference"):
        assert any(code.dots for _, code in named(kernels, part)), f"no product in {part}"
    check(kernels, lambda launch, code: no_tensor_cores(launch, code, architecture.capability))


def test_pointwise_kernels_use_the_instructions_of_their_architecture(kernels, case: Case) -> None:
    """Not only where the tile allows it: of each kind of kernel, for each dtype, some tile does."""
    architecture, networks = case
    wanted = TENSOR_CORES[architecture.capability]
    kinds = ("bf16", "f16") if networks == ALL else ("bf16",)
    for part, kind in product(("pointwise_forward", "pointwise_backward"), kinds):
        mine = [code for _, code in named(kernels, part) if any(dot[0] == kind for dot in code.dots)]
        assert any(code.matching(wanted) for code in mine), (part, kind)


@pytest.mark.slow
@pytest.mark.parametrize("act", [Act.RELU6, Act.HARDSWISH, Act.SILU, Act.LEAKY_RELU], ids=str)
def test_other_activations(act: Act, workers: ProcessPoolExecutor) -> None:
    """In the launches of the widest network. All but ReLU6 need a few registers more than ReLU, for which the launch
    parameters were measured, so that a few values are kept in local memory."""
    (architecture,) = (a for a in ARCHITECTURES if a.name == FIRST)
    launches = record(architecture, ONE).values()
    mine = [other for launch in launches if (other := machine_code.with_activation(launch, act))]
    kernels = list(zip(mine, workers.map(machine_code.compile_launch, mine, [architecture] * len(mine)), strict=True))
    check(kernels, lambda launch, code: loses_nan(code))
    more = 0 if act == Act.RELU6 else 32

    def found(launch: Launch, code: CompiledLaunch) -> str | None:
        allowed = more + (known_to_spill(launch) if has_bias(launch) else 0)
        return spilled(code) if code.stack > allowed or code.local else None

    check(kernels, found)


# The checks themselves: each must see a kernel with that very fault.


@pytest.fixture(scope="module")
def planted(workers: ProcessPoolExecutor) -> dict[str, tuple[Launch, CompiledLaunch]]:
    launches = planted_kernels.record(ARCHITECTURES[1])
    codes = workers.map(machine_code.compile_launch, launches, [ARCHITECTURES[1]] * len(launches))
    return {launch.kernel: (launch, code) for launch, code in zip(launches, codes, strict=True)}


def test_a_spill_is_seen(planted) -> None:
    assert spilled(planted["spills"][1]) and not spilled(planted["keeps_nan"][1])


def test_a_maximum_that_loses_nan_is_seen(planted) -> None:
    assert loses_nan(planted["loses_nan"][1]) and not loses_nan(planted["keeps_nan"][1])


def test_narrow_accesses_are_seen(planted) -> None:
    assert narrow(planted["narrow"][1]) and not narrow(planted["wide"][1])


def test_a_product_without_tensor_cores_is_seen(planted) -> None:
    launch, code = planted["multiplies"]
    assert no_tensor_cores(launch, code, 90) is None
    assert no_tensor_cores(launch, replace(code, instructions=["HMMA.16816.F32", "FFMA"]), 90)
    assert no_tensor_cores(launch, replace(code, instructions=["FFMA"]), 80)
