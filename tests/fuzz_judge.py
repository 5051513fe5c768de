"""Runs a problem of the fuzz and judges it: every output, gradient and statistic within the README's promises.

float32 and float64 are held to a relative error, 16 bits to 1.5 times PyTorch's own error on identical inputs. What
misses that is measured again by what rounding alone does to this very problem (``fuzz_yardstick.py``); 16 bits too,
because PyTorch's own error is one draw, and with few elements a lucky one. ReLUs of the reference take the signs of the
tested run, which may differ from its own within rounding of the corner alone.

NaN and Inf have to be in PyTorch's places, or where rounding alone puts them: it decides what overflows. In sums over
many elements (gradients of parameters, statistics) only whether they are finite is compared, because PyTorch's own
algorithms disagree about Inf and NaN there.

Where PyTorch reads memory that nobody wrote, nothing can be asked of what comes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fuzz_yardstick import Corner, Reference, Rounding, Signs, clone, corners, impose, memory_of, plain_twin
from plain import FLOAT32_UNIT, FORWARD, GRADIENT, SIXTEEN_BITS, TRAINING_FORWARD
from torch import Tensor, nn

FLOAT64 = 1e-12
# Runs of the reference with random rounding; where a few do not explain an error, many: of seven channels' sums the
# largest of eight is a matter of luck.
SAMPLES = (8, 64)
# float32 and float64: how much further away than the largest of these runs an error may be. They round each value once;
# a sum of n terms rounds n times, and a coefficient of a whole channel is a product of several rounded factors.
BEYOND = 16


@dataclasses.dataclass
class Problem:
    """``ours(model, x)`` is to give what ``plain(model, x)`` gives of the same modules, none of them fused."""

    settings: dict[str, Any]
    model: nn.Module
    x: Tensor
    ours: Callable[[nn.Module, Tensor], Any]
    plain: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)
    exact_model: nn.Module | None = None  # where float64 does not start from the rounded parameters of ``model``
    gradients: bool = True
    mode: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    autocast: torch.dtype | None = None
    upstream: Callable[[int, Tensor], Tensor] = lambda i, out: torch.ones_like(out)
    finite: bool = True  # whether all that was drawn is
    threads: tuple[int, int] = (1, 1)
    counts_batches: bool = True  # functions do not
    in_eval: bool = False  # whatever the mode of ``model``
    strides: bool = True  # whether outputs have those of the plain modules'

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or self.x.dtype

    @property
    def is_unit(self) -> bool:
        """Whether it is one op or unit, whose errors nothing multiplies."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) <= 1

    def promise(self, name: str) -> float:
        """The relative error that is accepted of a result in float32 or float64."""
        if self.dtype == torch.float64:
            return FLOAT64
        if "gradient" in name:
            return GRADIENT
        in_training = not self.in_eval and any(module.training for module in self.model.modules())
        return TRAINING_FORWARD if in_training and not self.is_unit else FORWARD


Results = dict[str, Any]


def judge(problem: Problem) -> list[str]:
    """What is wrong, in words; empty where nothing is."""
    with _threads(1):
        own_model = plain_twin(problem.model)
        own, own_error = _attempt(problem, problem.plain, own_model, problem.x)
    given = problem.x.detach().clone()
    with _threads(problem.threads[0]):
        ours, error = _attempt(problem, problem.ours, clone(problem.model), problem.x)
    if own_error or error:
        if type(error) is type(own_error) and (
            error is None or isinstance(error, (ValueError, TypeError, RuntimeError))
        ):
            return []
        return [f"raised {error!r}, plain modules {own_error!r}"]
    if not torch.equal(given.nan_to_num(1.5), problem.x.detach().nan_to_num(1.5)):
        return ["the input was changed"]

    if ours.keys() != own.keys():
        return [f"{len(ours)} results, of plain modules {len(own)}"]
    described = {name: _described(problem, name, tensor) for name, tensor in own.items()}
    complaints = [
        f"{name}: {told}, plain modules {described[name]}"
        for name, told in ((name, _described(problem, name, tensor)) for name, tensor in ours.items())
        if told != described[name]
    ]
    if complaints:
        return complaints

    with _threads(problem.threads[1]), Signs() as signs:
        again, error = _attempt(problem, problem.ours, clone(problem.model), problem.x)
    if not (error or problem.gradients):  # who is watched runs without plans, which may cut a model into other chains
        with _threads(problem.threads[1]):
            again, error = _attempt(problem, problem.ours, clone(problem.model), problem.x)
    if error:
        return [f"a second run raised {error!r}"]
    if signs.all_fused:
        other = [name for name in ours if not _same_bits(ours[name], again[name])]
        complaints += [f"{name}: other bits in a second run, on {problem.threads} threads" for name in other]
    else:  # what PyTorch computes has other bits on another number of threads, and then other signs at a corner
        with _threads(problem.threads[0]), Signs() as signs:
            _attempt(problem, problem.ours, clone(problem.model), problem.x)
    masks = signs.masks if problem.gradients else None
    if masks is not None and len(masks) != len(corners(own_model)):
        return [*complaints, f"{len(masks)} ReLUs ran of {len(corners(own_model))}"]
    if masks and not problem.finite:
        # The places must not depend on whose rounding decides where a ReLU lets pass.
        with _threads(1):
            own_model = plain_twin(problem.model)
            impose(own_model, masks)
            own, _ = _attempt(problem, problem.plain, own_model, problem.x)
    return complaints + _compare(problem, ours, own, masks, own_model, signs.all_fused)


def _described(problem: Problem, name: str, x: Tensor | None) -> tuple[Any, ...]:
    if x is None:
        return (None,)
    is_output = "output" in name
    strides = x.stride() if is_output and problem.strides and x.numel() else ()
    if x.dtype == torch.float64:
        # PyTorch's algorithm for float64 makes one pixel contiguous where all others, and the kernels, keep the format.
        strides = tuple(s for s, size in zip(strides, x.shape, strict=False) if size > 1)
    return (x.dtype, tuple(x.shape), strides, is_output and problem.gradients and x.requires_grad)


def _compare(
    problem: Problem,
    ours: Results,
    own: Results,
    masks: list[Tensor | None] | None,
    own_model: nn.Module,
    all_fused: bool,
) -> list[str]:
    sixteen_bits = problem.dtype.itemsize == 2
    reference = Reference(problem.exact_model or problem.model)
    exact, zs = _exact(problem, reference, masks)
    own_exact, own_masks = exact, None
    if sixteen_bits and masks:
        own_masks = [None if corner.z is None else ~(corner.z <= 0) for corner in corners(own_model)]
        own_exact, _ = _exact(problem, reference, own_masks)

    complaints, late, misplaced = [], {}, {}
    by_taps: Results = {}
    cancelled = _biases_before_batch_statistics(problem.model)
    for name, b in own.items():
        a, e, own_e = ours[name], exact[name], own_exact[name]
        if a is None or a.numel() == 0:
            continue
        if not a.is_floating_point():
            complaints += [f"{name}: {a.tolist()}, plain modules {b.tolist()}"] if not torch.equal(a, b) else []
            continue
        if name in cancelled and not a.any():
            continue  # zero, by contract
        # Of its kernels for 16 bits one multiplies Inf by the zeros it pads weights with, and one reads memory that
        # nobody wrote; float64 has neither.
        e = torch.where(e.abs() > torch.finfo(a.dtype).max, e.sign() * torch.inf, e)
        others = [_misplaced(name, a, x) for x in (b, e)]
        if not problem.finite and all(other.any() for other in others):
            by_taps = by_taps or _exact(problem, reference, masks, by_taps=True)[0]
            others.append(_misplaced(name, a, by_taps[name]))
        if all(other.any() for other in others):
            misplaced[name] = (a, torch.stack(others).all(0))
        finite = a.isfinite() & e.isfinite()
        own_finite = finite & b.isfinite() & own_e.isfinite()
        error, norm = _distance(a, e, finite), _norm(e[finite])
        if sixteen_bits:
            # Of 16-bit values, what float32 holds is held to float32's promise.
            floor = FORWARD if a.dtype == torch.float32 and not problem.autocast else FLOAT32_UNIT
            limit = max(SIXTEEN_BITS * _distance(b, own_e, own_finite), floor * norm)
        else:
            limit = problem.promise(name) * norm
        if error > limit:
            limit = max(limit, SIXTEEN_BITS * _distance(b, own_e, own_finite))
            late[name] = (error, limit, norm, finite)

    flipped = _flips(problem, masks, zs, corners(own_model)) if masks and problem.finite else []
    beyond_rounding: list[str] = []
    samples: list[tuple[Results, list[Tensor]]] = []
    for count in SAMPLES if late or flipped or misplaced else ():
        samples += [
            _exact(problem, reference, masks, Rounding(problem.dtype, seed)) for seed in range(len(samples), count)
        ]
        beyond_rounding = _beyond_rounding(problem, exact, late, flipped, zs, samples)
        for name, (a, where) in misplaced.items():
            if all((where := where & _misplaced(name, a, sample[name])).any() for sample, _ in samples):
                beyond_rounding.append(f"{name}: NaN and Inf in other places than PyTorch's")
        if not beyond_rounding:
            break
    complaints += beyond_rounding
    if complaints and sixteen_bits and not all_fused:
        garbage = unwritten(problem)
        complaints = [c for c in complaints if not garbage & {"output", c.partition(":")[0]}]
    return complaints


def unwritten(problem: Problem) -> set[str]:
    """The results of plain modules that depend on what memory was before: of PyTorch's convolutions for 16 bits some
    read what nobody wrote (10x2 images at stride 2, gradients of depthwise weights), also as a part of ours."""
    found = set()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        runs = []
        for byte in (0, 126):
            model = plain_twin(problem.model).to(memory_format=memory_format)
            x = problem.x.detach().contiguous(memory_format=memory_format).requires_grad_(problem.x.requires_grad)
            with _threads(1), memory_of(byte):
                runs.append(_attempt(problem, problem.plain, model, x)[0])
        found |= {name for name, result in runs[0].items() if not _same_bits(result, runs[1][name])}
    return found


def _beyond_rounding(
    problem: Problem,
    exact: Results,
    late: dict[str, tuple[float, float, float, Tensor]],
    flipped: list[tuple[int, Tensor]],
    zs: list[Tensor],
    samples: list[tuple[Results, list[Tensor]]],
) -> list[str]:
    """What of these errors and signs is further away than rounding takes the samples."""
    complaints = []
    sixteen_bits = problem.dtype.itemsize == 2
    output = exact["output"]
    differences = sorted(_distance(sample["output"], output, sample["output"].isfinite()) for sample, _ in samples)
    # Nothing is left of the output in most samples. (A gradient may be nearly zero, and its samples not.)
    chaotic = not problem.is_unit and differences[len(differences) // 2] > _norm(output)
    for name, (error, limit, norm, finite) in late.items():
        noises = sorted(_distance(sample[name], exact[name], finite & sample[name].isfinite()) for sample, _ in samples)
        noise = noises[-1]
        beyond = BEYOND
        if sixteen_bits and problem.is_unit:
            beyond = SIXTEEN_BITS
        elif sixteen_bits and max(limit, noise) < norm / 4:
            beyond = 2 * SIXTEEN_BITS  # the promise is one for ops and units; a chain multiplies their errors
        elif sixteen_bits:
            # Where they reach the size of the result it is chaotic, and PyTorch's own error is one draw. If in most
            # samples nothing is left of the result, its size is all that can be compared.
            limit *= BEYOND
            beyond = BEYOND**2 if noises[len(noises) // 2] > norm else BEYOND
        elif chaotic:
            beyond = BEYOND**2
        limit = max(limit, noise * beyond)
        if not error <= limit:
            relative = [f"{value / (norm or 1):.1e}" for value in (error, limit)]
            complaints.append(f"{name}: relative error {relative[0]}, accepted {relative[1]}, norm {norm:.1e}")
    for i, distance in flipped:
        noise = torch.stack([(z[i] - zs[i]).abs().amax((0, 2, 3)) for _, z in samples]).amax(0)
        # Where a chain is chaotic, as in 16 bits, a few samples of one channel do not tell.
        if not problem.is_unit and (sixteen_bits or noise.amax() > zs[i].square().mean().sqrt()):
            noise = noise.amax()
        if (distance > noise * BEYOND).any():
            complaints.append(f"ReLU {i}: wrong side by up to {distance.max():.1e}, rounding is {noise.max():.1e}")
    return complaints


def _flips(
    problem: Problem, masks: list[Tensor | None], zs: list[Tensor], own: list[Corner]
) -> list[tuple[int, Tensor]]:
    """The ReLUs that took values for those on the other side of the corner, by more than the roundoff of ordinary ones
    and than PyTorch's own values are off, and by channel how far from the corner these are."""
    found = []
    for i, (mask, z, corner) in enumerate(zip(masks, zs, own, strict=True)):
        if mask is not None and z.numel():
            beyond = (z.abs() * (mask != (z > 0))).amax((0, 2, 3))
            allowed = 4 * torch.finfo(problem.dtype).eps * z.square().mean((0, 2, 3)).sqrt()
            if corner.z is not None:
                allowed = allowed.maximum(SIXTEEN_BITS * (corner.z.double() - z).abs().amax((0, 2, 3)))
            if (beyond > allowed).any():
                found.append((i, beyond))
    return found


def _exact(
    problem: Problem,
    reference: Reference,
    masks: list[Tensor | None] | None,
    rounding: Rounding | None = None,
    by_taps: bool = False,
) -> tuple[Results, list[Tensor]]:
    """The problem in float64, with the ReLUs' masks of another run, and what the ReLUs were given."""
    reference.start(masks, rounding, by_taps)
    x = problem.x.detach().double().requires_grad_(problem.x.requires_grad)
    with _threads(1):
        double = dataclasses.replace(problem, autocast=None)
        results = _step(double, problem.plain, reference.model, x, reference.slots)
    return results, [corner.z for corner in reference.corners]


def _attempt(problem: Problem, run: Callable, model: nn.Module, x: Tensor) -> tuple[Results, Exception | None]:
    x = x.detach().requires_grad_(x.requires_grad)  # the same memory and strides, a gradient of its own
    try:
        return _step(problem, run, model, x, _slots(model)), None
    except Exception as error:  # whether it is the plain modules' own is what is judged
        return {}, error


Slots = list[tuple[str, nn.Module, str]]


def _slots(model: nn.Module) -> Slots:
    """Where each parameter and buffer is, by name."""
    return [
        (name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
    ]


def _step(problem: Problem, run: Callable, model: nn.Module, x: Tensor, slots: Slots) -> Results:
    with problem.mode(), torch.autocast("cpu", problem.autocast, enabled=problem.autocast is not None):
        out = run(model, x)
    outs = out if isinstance(out, (tuple, list)) else (out,)
    results: Results = {f"output {i}" if i else "output": o for i, o in enumerate(outs)}
    if problem.gradients:
        pairs = [(o, problem.upstream(i, o)) for i, o in enumerate(outs) if o.requires_grad]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        results["gradient of the input"] = x.grad
    for name, module, key in slots:
        tensor = getattr(module, key)
        if isinstance(tensor, nn.Parameter):
            if problem.gradients:
                results[f"gradient of {name}"] = tensor.grad
        elif problem.counts_batches or key != "num_batches_tracked":
            results[name] = tensor.clone()
    return results


def _biases_before_batch_statistics(model: nn.Module) -> set[str]:
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return {
        f"gradient of {name}.bias"
        for (name, conv), (_, bn) in zip(leaves, leaves[1:], strict=False)
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and (bn.training or bn.running_mean is None)
    }


def _misplaced(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Where ``a`` has NaN or Inf and ``b`` has not the same, or the other way round."""
    a, b = a.detach(), b.detach()
    if "output" in name or name == "gradient of the input":
        return torch.stack([is_(a) != is_(b) for is_ in (torch.isnan, torch.isposinf, torch.isneginf)]).any(0)
    misplaced = a.isfinite() != b.isfinite()
    if a.ndim == 4 and a.shape[2] > 1:
        # Whether Inf times padding counts depends on PyTorch's algorithm; in the centre is no padding.
        padded = torch.ones(a.shape[2:], dtype=torch.bool)
        padded[a.shape[2] // 2, a.shape[3] // 2] = False
        misplaced &= ~(padded & a.isfinite())
    return misplaced


def _distance(a: Tensor, b: Tensor, where: Tensor) -> float:
    return _norm(a.detach()[where].double() - b.detach()[where].double())


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach().double()).item()


def _same_bits(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(bits), b.detach().contiguous().view(bits))


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
