"""PyTorch's own ways to run the network, timm's network, and mobilenet_ext."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobilenet_ext as mx
from benchmarks.network import CLASSES, Workload
from benchmarks.peers.base import FirstStep, Peer

LEARNING_RATE, MOMENTUM, LABEL_SMOOTHING = 0.01, 0.9, 0.1


class Inference:
    """Weights and images in the workload's dtype."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images

    def __call__(self) -> Tensor:
        with torch.no_grad():
            self.output = self.model(self.images)
        return self.output

    def logits(self) -> Tensor:
        return self.output


class Training:
    """Parameters in float32; 16 bits by autocast."""

    def __init__(self, model: nn.Module, images: Tensor, work: Workload, parameters: nn.Module) -> None:
        self.model, self.images, self.work, self.parameters = model, images, work, parameters
        self.labels = work.labels()
        self.optimizer = torch.optim.SGD(parameters.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        dtype = self.work.torch_dtype
        with torch.autocast(self.work.device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(self.model(self.images), self.labels, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def first_step(self) -> FirstStep:
        self()
        return self.outcome()

    def outcome(self) -> FirstStep:
        """Of the last step."""
        classifier, stem = (grad.float().cpu() for grad in gradients_of(self.parameters))
        return FirstStep(self.loss.item(), classifier, stem)


def gradients_of(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Of the weights of its last and its first layer."""
    weights = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return weights[-1].grad, weights[0].grad


class TorchPeer(Peer):
    version_of = "torch"
    memory_format = torch.channels_last

    def network(self, work: Workload) -> nn.Module:
        return work.plain()

    def compiled(self, model: nn.Module) -> nn.Module:
        return model

    def _ready(self, work: Workload) -> tuple[nn.Module, Tensor]:
        if work.device == "cuda":
            torch.backends.cudnn.benchmark = True
        network = self.network(work).to(memory_format=self.memory_format)
        return network, work.images().contiguous(memory_format=self.memory_format)

    def inference(self, work: Workload) -> Inference:
        network, images = self._ready(work)
        dtype = work.torch_dtype
        return Inference(self.compiled(network.eval().requires_grad_(False).to(dtype)), images.to(dtype))

    def training(self, work: Workload) -> Training:
        network, images = self._ready(work)
        return Training(self.compiled(network), images, work, network)


class MobileNetExt(TorchPeer):
    """``freeze`` for inference; for training the drop-in model, or ``fuse``."""

    version_of = "mobilenet_ext"

    def network(self, work: Workload) -> nn.Module:
        return mx.freeze(work.model()) if work.task == "inference" else mx.fuse(work.model())


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captured as PyTorch's notes on CUDA graphs say: after a few calls on a stream that is not the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


class CapturedInference:
    """An inference in a CUDA graph."""

    def __init__(self, inference: Inference) -> None:
        self.inference, self.graph = inference, capture(inference)

    def __call__(self) -> None:
        self.graph.replay()

    def logits(self) -> Tensor:
        return self.inference.logits()


class CapturedTraining:
    """A training step in a CUDA graph, from the same weights as without one."""

    def __init__(self, training: Training) -> None:
        self.training = training
        parameters = list(training.parameters.parameters())
        initial = [parameter.detach().clone() for parameter in parameters]
        self.graph = capture(training)
        with torch.no_grad():  # the capture's own steps are undone: in place, where the graph finds the tensors
            torch._foreach_copy_(parameters, initial)
            for state in training.optimizer.state.values():
                state["momentum_buffer"].zero_()

    def __call__(self) -> None:
        self.graph.replay()

    def first_step(self) -> FirstStep:
        self()
        return self.training.outcome()


class InGraph:
    """For a peer: the same in a CUDA graph."""

    def refuses(self, work: Workload) -> str | None:
        return None if work.device == "cuda" else "a CUDA graph needs a GPU"

    def inference(self, work: Workload) -> CapturedInference:
        return CapturedInference(super().inference(work))

    def training(self, work: Workload) -> CapturedTraining:
        return CapturedTraining(super().training(work))


class MobileNetExtCaptured(InGraph, MobileNetExt):
    pass


class EagerNchw(TorchPeer):
    memory_format = torch.contiguous_format


class EagerChannelsLast(TorchPeer):
    pass


class EagerCaptured(InGraph, EagerChannelsLast):
    pass


class Compile(TorchPeer):
    """``torch.compile`` in its default mode, channels_last."""

    mode: str | None = None

    def refuses(self, work: Workload) -> str | None:
        if work.device == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton on a GPU"
        return None

    def compiled(self, model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(model, mode=self.mode)


class CompileMaxAutotune(Compile):
    mode = "max-autotune"


class _Frozen(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=True):  # read when the first call compiles
            return self.model(x)


class CompileFreezing(Compile):
    """``torch.compile`` with its own folding of BatchNorm and packing of weights."""

    def refuses(self, work: Workload) -> str | None:
        return "freezing is for inference" if work.task == "training" else super().refuses(work)

    def compiled(self, model: nn.Module) -> nn.Module:
        return _Frozen(super().compiled(model))


class Timm(TorchPeer):
    """timm's ``mobilenetv1_100`` with ReLU for its ReLU6, and our weights."""

    module = version_of = "timm"

    def refuses(self, work: Workload) -> str | None:
        return None if work.is_mobilenet_v1 and work.width == 1 else "its mobilenetv1_100 is MobileNetV1 of width 1"

    def network(self, work: Workload) -> nn.Module:
        import timm

        theirs = timm.create_model("mobilenetv1_100", num_classes=CLASSES, act_layer="relu").to(work.device)
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        ours = [module for module in work.model().modules() if isinstance(module, kinds)]
        for to, from_ in zip((m for m in theirs.modules() if isinstance(m, kinds)), ours, strict=True):
            to.load_state_dict(from_.state_dict())
        return theirs.train(work.task == "training")
