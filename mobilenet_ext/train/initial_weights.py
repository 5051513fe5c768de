"""Weights that a run starts from: a checkpoint of another run, or a file of torchvision's, timm's or anybody's."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobilenet_ext.train.checkpoint import load_archive, read_file
from mobilenet_ext.train.errors import TrainError, reason, require

KIND = "file of weights"
NESTED = ("state_dict", "model")  # where training scripts, this package's among them, put the weights in their files
PARALLEL = "module."  # in front of every name of a model that was saved inside of DataParallel


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The content of a file of weights.

    Attributes:
        path: the file.
        sha256: of its bytes, in hexadecimal digits.
        tensors: by the names of a ``state_dict``, on the CPU.
    """

    path: str
    sha256: str
    tensors: Mapping[str, Tensor]

    @property
    def origin(self) -> dict[str, str]:
        """What a run records of them."""
        return {"file": self.path, "sha256": self.sha256}


def read_initial_weights(path: str | os.PathLike[str]) -> InitialWeights:
    """Reads a file of weights: ``.safetensors``, anything else as ``torch.save`` writes it; no code from it is run.

    A state dict may be the file's whole content or its entry ``"state_dict"`` or ``"model"``, and all its names may
    begin with ``module.``. A checkpoint of this package is held against its digest.

    Raises:
        TrainError: the file cannot be read, is damaged, or holds something else; the package safetensors is missing.
    """
    raw = read_file(path, KIND)
    content = _load_safetensors(path, raw) if Path(path).suffix == ".safetensors" else load_archive(path, raw, KIND)
    for entry in NESTED:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not content:
        raise TrainError(f"{path} is not a {KIND}: expected dense tensors by name, got {_described(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not _is_dense(value):
            raise TrainError(f"{path} is not a {KIND}: expected dense tensors by name, got {name}: {_described(value)}")
    if all(name.startswith(PARALLEL) for name in content):
        content = {name.removeprefix(PARALLEL): value for name, value in content.items()}
    return InitialWeights(str(path), hashlib.sha256(raw).hexdigest(), content)


def load_initial_weights(model: nn.Module, weights: InitialWeights, classes: int, network: str) -> list[str]:
    """Loads weights into a freshly built model.

    A head for another number of classes is not taken: the model's own keeps its initial values. BatchNorm's counts of
    batches may be missing, as in old files. Where it raises, the model is as it was.

    Args:
        model: the model, with a head for ``classes``.
        weights: as ``read_initial_weights`` gives them.
        classes: the model's logits for an image.
        network: the model's name, for messages.

    Returns:
        The tensors that were not taken, each as ``NAME SHAPE, here SHAPE``.

    Raises:
        TrainError: the weights are not those of such a model; the message names the first tensor that differs.
    """
    own, given = model.state_dict(), weights.tensors
    fresh = _tensors_of_another_head(model, given, classes)
    for name, value in own.items():
        missing = name not in given
        if name in fresh or (missing and name.endswith(".num_batches_tracked")):
            continue
        difference = "missing" if missing else _difference(given[name], value)
        if difference is not None:
            raise TrainError(f"the weights in {weights.path} do not fit {network}: {name} is {difference}")
        own[name] = given[name]
    for name in given:
        if name not in own:
            raise TrainError(f"the weights in {weights.path} do not fit {network}, which has no {name}")
    model.load_state_dict(own)
    return [f"{name} {list(given[name].shape)}, here {list(own[name].shape)}" for name in fresh]


def _tensors_of_another_head(model: nn.Module, given: Mapping[str, Tensor], classes: int) -> list[str]:
    """The tensors of the layers that make the logits, where ``given`` has them for another number of classes.

    Some networks have several. A layer in the middle with as many outputs may be among them, but never passes: what
    reads its outputs has another shape in such a file as well, and that is refused.
    """
    names: list[str] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        own = {f"{path}.{name}": value for name, value in layer.state_dict().items()}
        if any(name not in given or given[name].shape[1:] != value.shape[1:] for name, value in own.items()):
            continue
        ours, theirs = ({tensors[name].shape[:1] for name in own} for tensors in (own, given))
        if ours == {(classes,)} and theirs != ours and len(theirs) == 1:
            names += own
    return names


def _difference(given: Tensor, own: Tensor) -> str | None:
    """In what a tensor differs from the model's own so that it cannot take its place."""
    if given.shape != own.shape:
        return f"{list(given.shape)}, not {list(own.shape)}"
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (given, own)]
    return None if kinds[0] == kinds[1] else f"of {given.dtype}, not of {own.dtype}"


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _load_safetensors(path: str | os.PathLike[str], raw: bytes) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", "reading .safetensors files", "safetensors")
    try:
        return safetensors.load(raw)
    except Exception as error:  # the format's own errors have no common class
        raise TrainError(f"{path} is not a {KIND}, or is truncated or damaged: {reason(error)}") from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of {value.dtype} on {value.device}"
    return f"{type(value).__name__} {' '.join(str(value).split())[:60]}".rstrip()
