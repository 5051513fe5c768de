"""What ``_host`` says of dictionaries and tensors: whether they are as they were."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from mobilenet_ext import _host


class Dicts:
    """Some to count and some to look into, as they are now."""

    def __init__(self) -> None:
        self.values = [object() for _ in range(4)]
        a, b, c, _ = self.values
        self.counted = ({}, OrderedDict(), {"one": 1, "two": 2})
        self.held = ({"a": a, "b": b}, OrderedDict(c=c), {"none": None})
        self.counts, self.contents = (0, 0, 2), (a, b, c, None)

    def are_the_same(self) -> bool:
        return _host.dicts_are(self.counted, self.counts, self.held, self.contents)


CHANGES = {
    "an entry in an empty one": lambda d: d.counted[0].update(x=1),
    "an entry in an empty OrderedDict": lambda d: d.counted[1].update(x=1),
    "one entry more": lambda d: d.counted[2].update(three=3),
    "one entry less": lambda d: d.counted[2].popitem(),
    "another value": lambda d: d.held[0].update(a=d.values[3]),
    "None": lambda d: d.held[1].update(c=None),
    "a value more": lambda d: d.held[2].update(x=d.values[3]),
    "a None more": lambda d: d.held[2].update(x=None),
    "a value less": lambda d: d.held[2].clear(),
    "a value less in front": lambda d: d.held[0].pop("a"),
    "another order": lambda d: d.held[0].update(a=d.held[0].pop("a")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_dictionary_is_noticed(change: str) -> None:
    dicts = Dicts()
    assert dicts.are_the_same()
    CHANGES[change](dicts)
    assert not dicts.are_the_same()


def test_values_are_compared_by_identity() -> None:
    value, equal = [1], [1]
    held = ({"a": value},)
    assert _host.dicts_are((), (), held, (value,)) and not _host.dicts_are((), (), held, (equal,))
    held[0].update(a=value)
    assert _host.dicts_are((), (), held, (value,))


def test_what_is_no_dictionary_is_not_the_same() -> None:
    assert _host.dicts_are((), (), (), ())
    assert not _host.dicts_are(([],), (0,), (), ()) and not _host.dicts_are((), (), ([],), ())


TENSOR_CHANGES = {
    "in place": lambda t: t.add_(1),
    "through data": lambda t: setattr(t, "data", torch.ones(3)),
    "storage": lambda t: t.set_(torch.ones(3)),
}


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_a_change_of_a_tensor_is_noticed(change: str, index: int) -> None:
    tensors = torch.zeros(3), nn.Parameter(torch.zeros(3), requires_grad=False), nn.Buffer(torch.zeros(3))
    answers = tuple(answer for t in tensors for answer in (t._version, t.data_ptr()))

    def are_the_same() -> bool:
        return _host.tensors_answer(tensors, Tensor._version, Tensor.data_ptr, answers)

    assert are_the_same()
    TENSOR_CHANGES[change](tensors[index])
    assert not are_the_same()


def test_other_numbers_of_tensors_are_not_the_same() -> None:
    t = torch.zeros(3)
    answers = (t._version, t.data_ptr())
    assert _host.tensors_answer((t,), Tensor._version, Tensor.data_ptr, answers)
    assert not _host.tensors_answer((), Tensor._version, Tensor.data_ptr, answers)
    assert not _host.tensors_answer((t, t), Tensor._version, Tensor.data_ptr, answers)


def test_what_a_tensor_raises_is_raised() -> None:
    with torch.inference_mode():
        t = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Inference tensors do not track version"):
        _host.tensors_answer((t,), Tensor._version, Tensor.data_ptr, (0, t.data_ptr()))
    with pytest.raises(TypeError, match="descriptor"):
        _host.tensors_answer((t,), 0, Tensor.data_ptr, (0, t.data_ptr()))
