"""What an adapter offers."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple, Protocol

from torch import Tensor

from benchmarks.network import Workload


class FirstStep(NamedTuple):
    """What a training step from the initial weights leaves: its loss, and two gradients, float32 on the CPU."""

    loss: float
    classifier_grad: Tensor  # [classes, channels]
    stem_grad: Tensor  # [channels, 3, 3, 3]


class Runner(Protocol):
    """A network that is ready to run."""

    def __call__(self) -> object:
        """Inference of the batch, or a whole training step: forward, backward, SGD with momentum."""


class InferenceRunner(Runner, Protocol):
    def logits(self) -> Tensor:
        """Of the last call, ``[batch, classes]``."""


class TrainingRunner(Runner, Protocol):
    def first_step(self) -> FirstStep:
        """Makes the first call."""


class Peer:
    """An adapter. Weights, images and labels are the workload's, so that all peers compute the same."""

    module: str | None = None  # what must be installed
    version_of: str | None = None  # the distribution whose version a result states

    def missing(self, work: Workload) -> str | None:
        """None where the peer can do the work, else why not."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return self.refuses(work)

    def refuses(self, work: Workload) -> str | None:
        """Why an installed peer cannot do the work."""
        return None

    def inference(self, work: Workload) -> InferenceRunner:
        """Ready to be called. A peer that refuses every inference needs none."""
        raise NotImplementedError(f"{type(self).__name__} refuses inference")

    def training(self, work: Workload) -> TrainingRunner:
        """Ready to be called. A peer that refuses every training step needs none."""
        raise NotImplementedError(f"{type(self).__name__} refuses training")
