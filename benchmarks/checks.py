"""Every runner is checked against the plain network in float64 before it is timed.

An untrained network is badly conditioned: in 16 bits PyTorch's own logits are off by a tenth and more. So a runner may
be off by a fixed bound, or by twice what eager PyTorch is off in the same dtype, but never by half.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.network import Workload
from benchmarks.peers.base import FirstStep
from benchmarks.peers.torch_peers import LABEL_SMOOTHING, EagerChannelsLast, gradients_of

# Relative errors, norm of the difference over norm of the reference, that are allowed whatever eager PyTorch's are.
BOUNDS = {
    "logits": {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3},
    "loss": {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3},
    "classifier's gradient": {"float32": 1e-2, "bfloat16": 1e-1, "float16": 5e-2},
    # It has passed every ReLU twice: a sign that rounding turns turns it too.
    "stem's gradient": {"float32": 2e-1},  # in 16 bits it is off by as much as it is long
}
MOST = 0.5
IMAGES = 32  # of a larger inference batch, so many are compared


class Expected(NamedTuple):
    """What a workload should give, by name, and how far off it may be."""

    outputs: dict[str, Tensor]  # float64
    allowed: dict[str, float]


def expected_of(work: Workload) -> Expected:
    try:
        outputs = _exact(work, work.device)
    except torch.OutOfMemoryError:  # a GPU that has room for a step in float32 need not have it for one in float64
        outputs = _exact(work, "cpu")
    if work.device == "cuda":
        torch.cuda.empty_cache()  # not every runner takes its memory from PyTorch
    eager = errors(outputs_of(start(EagerChannelsLast(), work), work), outputs)
    bounds = {name: of_dtype[work.dtype] for name, of_dtype in BOUNDS.items() if work.dtype in of_dtype}
    allowed = {name: min(MOST, max(bounds[name], 2 * eager[name])) for name in outputs if name in bounds}
    return Expected(outputs, allowed)


def _exact(work: Workload, device: str) -> dict[str, Tensor]:
    """The plain network's outputs in float64."""
    model = copy.deepcopy(work.plain()).to(device).double()
    if work.task == "inference":
        with torch.no_grad():
            return {"logits": model(work.images()[:IMAGES].to(device).double()).cpu()}
    images, labels = work.images().to(device).double(), work.labels().to(device)
    loss = F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)
    loss.backward()
    classifier, stem = gradients_of(model)
    return _named(FirstStep(loss.item(), classifier.cpu(), stem.cpu()))


def start(peer: Any, work: Workload) -> Any:
    """The peer's runner for the workload, not yet called."""
    return peer.inference(work) if work.task == "inference" else peer.training(work)


def outputs_of(runner: Any, work: Workload) -> dict[str, Tensor]:
    """Of the runner's first call."""
    if work.task == "training":
        return _named(runner.first_step())
    runner()
    return {"logits": runner.logits()[:IMAGES]}


def _named(step: FirstStep) -> dict[str, Tensor]:
    return {
        "loss": torch.tensor(step.loss),
        "classifier's gradient": step.classifier_grad,
        "stem's gradient": step.stem_grad,
    }


def errors(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by name."""
    return {name: _relative(outputs[name], expected[name]) for name in expected}


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual.detach().cpu().double() - expected).norm() / expected.norm()).item()


def judge(outputs: dict[str, Tensor], expected: Expected) -> tuple[float, str | None]:
    """The error of the logits or of the classifier's gradient, and what is wrong with the outputs if anything is."""
    found = errors(outputs, expected.outputs)
    # Written so that a NaN is wrong too.
    wrong = [name for name, allowed in expected.allowed.items() if not found[name] <= allowed]
    error = found["logits" if "logits" in found else "classifier's gradient"]
    if not wrong:
        return error, None
    name = wrong[0]
    return error, f"wrong {name}: relative error {found[name]:.1e}, allowed {expected.allowed[name]:.0e}"
