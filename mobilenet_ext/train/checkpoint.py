"""Checkpoints: written whole or not at all, and read without running code from the file or believing what it says."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.errors import RecipeError, TrainError, reason
from mobilenet_ext.train.recipe import Recipe
from mobilenet_ext.train.records import HISTORY

FORMAT = "mobilenet_ext checkpoint 1"

# `torch.save` writes a zip archive. Its comment, which ends the file, is the digest of all bytes before the comment.
DIGEST = "sha256"
_COMMENT = DIGEST.encode() + b":"
_COMMENT_LENGTH = len(_COMMENT) + 2 * hashlib.new(DIGEST).digest_size
_END_OF_ARCHIVE = struct.Struct(
    "<4s4H2LH"
)  # the record that ends every zip archive; its last field: the comment's length
_END_SIGNATURE = b"PK\x05\x06"

Entries = Mapping[str, tuple[str, Callable[[Any], bool]]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


def _is_dict_of(kind: type, value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(item, kind) for item in value.values())
    )


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        _is_dict_of(object, row) and all(_is_number(row.get(name)) for name in HISTORY) and row["epoch"] == number
        for number, row in enumerate(value, start=1)
    )


# What a checkpoint holds besides its recipe, in words and as a check.
MODEL: Entries = {
    "model": ("tensors by name", lambda value: _is_dict_of(Tensor, value)),
    "classes": (
        "a list of one or more names",
        lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value),
    ),
}
STATE: Entries = {
    "epoch": ("a number of epochs", _is_count),
    "history": ("a row of numbers for each epoch", _is_history),
    "dataset": ("names and numbers of images", lambda value: _is_dict_of((str, int), value)),
    "rng": ("random states by device", lambda value: _is_dict_of(Tensor, value) and "cpu" in value),
    "optimizer": ("a state dict", lambda value: isinstance(value, dict)),
    "scheduler": ("a state dict", lambda value: isinstance(value, dict)),
    "scaler": ("a state dict or None", lambda value: value is None or isinstance(value, dict)),
    "init": ("a file and its digest, or None", lambda value: value is None or _is_dict_of(str, value)),
}


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file.
        content: tensors and plain types only, so that ``torch.load(weights_only=True)`` reads it.

    Raises:
        TrainError: it cannot be written, for example because the disk is full; an older ``path`` is still there.
    """
    # Serialised in memory first: a failing disk then fails one write, with the operating system's own reason.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "digest": DIGEST, **content}, buffer)
    _append_digest(buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        kept = f"; {path} is still the one of before" if os.path.exists(path) else ""
        raise TrainError(f"cannot write the checkpoint {path}: {reason(error)}{kept}") from error


def load_checkpoint(path: str | os.PathLike[str], *, resumable: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Args:
        path: the file.
        resumable: whether the entries of ``STATE`` are wanted besides those of ``MODEL``.

    Returns:
        What ``save_checkpoint`` was given, with ``config`` turned into a ``Recipe``.

    Raises:
        TrainError: the file is missing, truncated, changed since it was written, or something else than a checkpoint of
            this package; an entry that is wanted is missing, or not what it should be.
    """
    content = load_archive(path, read_file(path, "checkpoint"), "checkpoint")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainError(f"{path} is not a checkpoint of mobilenet-ext train")
    content.setdefault("init", None)  # it was written when every run began with random weights
    try:
        content["config"] = Recipe.from_dict(content["config"])
    except (KeyError, RecipeError) as error:
        raise TrainError(f"{path} holds a recipe that this version cannot use: {reason(error)}") from error
    for name, (expected, is_good) in (MODEL | STATE if resumable else MODEL).items():
        if name not in content or not is_good(content[name]):
            raise wrong_entry(path, name, expected, content.get(name))
    if resumable and not content["epoch"] == len(content["history"]) <= content["config"].epochs:
        raise wrong_entry(path, "epoch", f"{len(content['history'])}, the epochs in its history", content["epoch"])
    return content


def read_file(path: str | os.PathLike[str], kind: str) -> bytes:
    """The bytes of a file of some kind, which the message names where there are none.

    Raises:
        TrainError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise TrainError(f"cannot read the {kind} {path}: {reason(error)}") from error


def load_archive(path: str | os.PathLike[str], raw: bytes, kind: str) -> Any:
    """What ``torch.save`` wrote, on the CPU, without running code from it; checked where it has a checkpoint's digest.

    Args:
        path: of the file, for messages.
        raw: its bytes.
        kind: what it should be, for messages.

    Raises:
        TrainError: it is truncated, changed since it was written, or something else.
    """
    intact = _has_its_digest(raw)
    if intact is False:
        raise TrainError(f"{path} is damaged: its bytes are not those that were written")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it takes the file for
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch each have their own ways to say it
        raise TrainError(f"{path} is not a {kind}, or is truncated or damaged") from error
    # A checkpoint without this entry was written before there were digests; one that a user has loaded, and saved again
    # with `torch.save`, keeps the entry, and is an archive of its own.
    marked = isinstance(content, dict) and content.get("format") == FORMAT and "digest" in content
    if intact is None and marked and not _ends_as_torch_saves(raw):
        raise TrainError(f"{path} is not a {kind}, or is truncated or damaged")
    return content


def load_weights(model: nn.Module, content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint's weights into the model that its recipe describes.

    Raises:
        TrainError: they do not fit; ``path`` names the checkpoint in the message.
    """
    given = content["model"]
    for name, own in model.state_dict().items():
        if name in given and given[name].dtype != own.dtype:  # PyTorch would convert, whatever it is
            raise wrong_entry(path, f"model.{name}", f"a tensor of {own.dtype}", given[name])
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        network = content["config"].network
        first = (str(error).splitlines() + [""])[1].strip()  # the headline says only that there are errors
        raise TrainError(f"the weights in {path} do not fit {network}: {first}") from error


def load_state(part: Any, content: dict[str, Any], entry: str, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint's entry into the part of a run that it is the state of: optimizer, scheduler or scaler.

    Raises:
        TrainError: the entry has another structure than the part's own state; the message names what differs.
    """
    saved, own = content[entry], part.state_dict()
    _check_like(saved, own, entry, path)
    if isinstance(part, torch.optim.Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        _check_momenta(saved["state"], parameters, f"{entry}.state", path)
    part.load_state_dict({name: value for name, value in saved.items() if name in own})


def wrong_entry(path: str | os.PathLike[str], entry: str, expected: str, got: Any) -> TrainError:
    """The error of a checkpoint with an entry that is not what it should be."""
    if isinstance(got, Tensor):
        described = f"a tensor {list(got.shape)} of {got.dtype}"
    else:
        described = f"{type(got).__name__} {' '.join(str(got).split())[:60]}"
    return TrainError(f"{path} holds an entry that cannot be used: {entry}: expected {expected}, got {described}")


def _check_like(value: Any, example: Any, entry: str, path: str | os.PathLike[str]) -> None:
    """Raises where ``value`` lacks a number that ``example`` has, or has anything of another type in its place.

    Flags that only one of the two has are PyTorch's own business, which adds one now and then.
    """
    if isinstance(example, dict):
        if not isinstance(value, dict):
            raise wrong_entry(path, entry, "a dict", value)
        for name, own in example.items():
            if name in value:
                _check_like(value[name], own, f"{entry}.{name}", path)
            elif _is_number(own) or isinstance(own, (dict, list)):
                raise wrong_entry(path, f"{entry}.{name}", f"a {type(own).__name__}", None)
    elif isinstance(example, (list, tuple)):
        if type(value) is not type(example) or len(value) != len(example):
            raise wrong_entry(path, entry, f"a {type(example).__name__} of {len(example)}", value)
        for number, (item, own) in enumerate(zip(value, example, strict=True)):
            _check_like(item, own, f"{entry}.{number}", path)
    elif _is_number(example):
        if not _is_number(value):
            raise wrong_entry(path, entry, "a number", value)
    elif isinstance(example, (bool, str)) and type(value) is not type(example):
        raise wrong_entry(path, entry, f"a {type(example).__name__}", value)


def _check_momenta(state: Any, parameters: list[Tensor], entry: str, path: str | os.PathLike[str]) -> None:
    for index, buffers in state.items():
        if index not in range(len(parameters)) or not isinstance(buffers, dict):
            raise wrong_entry(path, f"{entry}.{index}", f"the state of one of {len(parameters)} parameters", buffers)
        own = parameters[index]
        for name, buffer in buffers.items():
            fits = isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype) == (own.shape, own.dtype)
            if buffer is not None and not fits:
                expected = f"a tensor {list(own.shape)} of {own.dtype}"
                raise wrong_entry(path, f"{entry}.{index}.{name}", expected, buffer)


def _append_digest(archive: io.BytesIO) -> None:
    raw = archive.getbuffer()
    signature, *fields, comment = _END_OF_ARCHIVE.unpack_from(raw, len(raw) - _END_OF_ARCHIVE.size)
    if signature != _END_SIGNATURE or comment:
        raise RuntimeError("torch.save has not written a zip archive without a comment")
    _END_OF_ARCHIVE.pack_into(raw, len(raw) - _END_OF_ARCHIVE.size, signature, *fields, _COMMENT_LENGTH)
    digest = hashlib.new(DIGEST, raw).hexdigest()
    raw.release()
    archive.seek(0, io.SEEK_END)
    archive.write(_COMMENT + digest.encode())


def _ends_as_torch_saves(raw: bytes) -> bool:
    """Whether the file is what `torch.save` makes, a zip archive that never had a comment or (on request) no archive.

    An archive that has lost its comment is none: the length before the comment still says that there was one.
    """
    if not raw.startswith(b"PK"):
        return True
    signature, *_, comment = _END_OF_ARCHIVE.unpack(raw[-_END_OF_ARCHIVE.size :])
    return signature == _END_SIGNATURE and comment == 0


def _has_its_digest(raw: bytes) -> bool | None:
    """Whether the file's bytes have the digest that it ends with; None where it ends with none."""
    archive, comment = raw[:-_COMMENT_LENGTH], raw[-_COMMENT_LENGTH:]
    if not comment.startswith(_COMMENT):
        return None
    return comment == _COMMENT + hashlib.new(DIGEST, archive).hexdigest().encode()
