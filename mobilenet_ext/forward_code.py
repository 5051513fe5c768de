"""What there may be in the code of a forward, and of the functions that it calls, for stand-ins to be handed to it.

A stand-in answers some questions otherwise than a tensor would, raises nothing where a tensor does, and is followed
once, for all calls to come: a number that is drawn meanwhile would never be drawn again. Code that may notice is
refused before it runs.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import inspect
import random
import signal
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import fx, nn

from mobilenet_ext.plain_data import is_data


class NotKnown(Exception):
    """A forward did something that a graph cannot repeat."""


class CannotLook(RuntimeError):
    """Nobody can follow the calls of this thread now."""


class Interrupted(Exception):
    """The calls were not followed to their end; another time they may be."""


ClassAttributes = dict[tuple[type, str], object]  # values, by class and name

# A stand-in, or a fused module, would answer them otherwise.
_QUESTIONS = {
    "isinstance", "issubclass", "is_tensor", "type", "__class__", "id", "is_", "is_not", "vars", "locals", "callable",
    "dir", "__dict__",
}  # fmt: skip
_PATTERNS = {"MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"}
_HANDLERS = {"SETUP_FINALLY", "SETUP_WITH", "BEFORE_WITH", "PUSH_EXC_INFO"}
_TRUSTED = ("torch", "mobilenet_ext")


class _Code(NamedTuple):
    """What the code of a function says."""

    why_not: str | None  # it is not followed
    asks: str | None  # what it would be answered otherwise
    reads: tuple[tuple[str, ...], ...]  # global variables, and attributes of them


@contextlib.contextmanager
def every_call_followed(class_attributes: ClassAttributes) -> Iterator[None]:
    """Whoever calls a function, in this thread, that cannot be followed is not known; the function is not run.

    Args:
        class_attributes: what is read of the classes of modules joins them.

    Raises:
        NotKnown: such a function was called.
        Interrupted: one was called where Python ignores errors, and what came after it is not known.
        CannotLook: a debugger follows the calls of this thread already, and a profiler too.
    """
    refused: list[str] = []

    def look_at(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and _library_of(frame) not in _TRUSTED:
            reason = _why_not_followed(frame, class_attributes)
            if reason is not None and not _came_by_itself(frame, start):
                refused.append(reason)
                raise NotKnown(reason)

    start = sys._getframe(2)  # of the `with` statement
    hook = _free_hook()
    hook(look_at)
    try:
        yield
    except Exception as error:
        if refused and not isinstance(error, NotKnown):
            raise Interrupted(refused[0]) from error
        raise
    finally:
        hook(None)
    if refused:
        raise Interrupted(refused[0])


def _free_hook() -> Callable[[object], None]:
    """What has a function called at each call of this thread, and serves nobody else: another's, if it is written in C,
    could not be put back."""
    if sys.gettrace() is None:
        return sys.settrace
    if sys.getprofile() is None:
        return sys.setprofile
    raise CannotLook("a debugger and a profiler follow the calls of this thread, so a forward cannot be followed")


def _library_of(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").split(".")[0]


def _came_by_itself(frame: types.FrameType, start: types.FrameType) -> bool:
    """Whether Python went here out of whatever was running: for a signal, or because something was freed. Somebody else
    wants it to run, and an error would end in nothing but a message."""
    handlers = filter(callable, map(signal.getsignal, signal.valid_signals()))
    codes = set(map(_code_of, (*handlers, *gc.callbacks))) - {None}
    while frame is not None and frame is not start:
        if frame.f_code.co_name == "__del__" or frame.f_code in codes or any(map(_is_dead, frame.f_locals.values())):
            return True
        frame = frame.f_back
    return False


def _code_of(function: object) -> types.CodeType | None:
    while isinstance(function, (functools.partial, types.MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if not isinstance(function, types.FunctionType):
        function = type(function).__call__
    return getattr(function, "__code__", None)


def _is_dead(value: object) -> bool:
    """Whether it is a weak reference to what was freed, as its callback is given."""
    return isinstance(value, weakref.ref) and value() is None


def _why_not_followed(frame: types.FrameType, class_attributes: ClassAttributes) -> str | None:
    """What there is in a function that stand-ins cannot be handed to."""
    code = _look_into(frame.f_code)
    given = list(frame.f_locals.values())  # arguments, and variables of functions around it
    if _library_of(frame) in sys.stdlib_module_names:
        return code.asks if any(map(_has_stand_in, given)) else None
    if code.asks is not None or code.why_not is not None:
        return code.asks or code.why_not
    if any(map(_is_random, given)) or any(_reads_random(names, frame.f_globals) for names in code.reads):
        return f"{frame.f_code.co_name} draws random numbers"
    for module in given:
        if isinstance(module, nn.Module):
            read = _class_attributes(module, frame.f_code.co_names)
            if any(map(_is_random, read.values())):
                return f"{frame.f_code.co_name} draws random numbers"
            if not all(map(is_data, read.values())):
                return "an attribute of its class may have a state of its own"
            class_attributes.update(read)
    return None


def _has_stand_in(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_stand_in, value))
    if isinstance(value, dict):
        return any(map(_has_stand_in, value.values()))
    return isinstance(value, fx.Proxy)


def _class_attributes(module: nn.Module, names: tuple[str, ...]) -> ClassAttributes:
    """Those of these names that the module has of its class, and that are no methods and the like."""
    kind, found = type(module), {}
    for name in names:
        value = inspect.getattr_static(kind, name, None)
        if name not in module.__dict__ and value is not None and not hasattr(type(value), "__get__"):
            found[kind, name] = value
    return found


@functools.cache
def _look_into(code: types.CodeType) -> _Code:
    instructions = list(dis.get_instructions(code))
    reads = tuple(_global_reads(instructions))
    asked = _QUESTIONS.intersection((*code.co_names, *(each for each in code.co_consts if isinstance(each, str))))
    if asked:
        return _Code(None, f"{code.co_name} asks for {min(asked)}", reads)
    if any(each.opname in _PATTERNS for each in instructions):
        return _Code(None, f"{code.co_name} matches patterns", reads)
    for before, each in zip(instructions, instructions[1:], strict=False):
        # PyTorch gives a tensor back as it is where nothing is to be done, and a stand-in is another one each time.
        if each.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval in (None, True, False)):
            return _Code(None, f"{code.co_name} asks what an object is", reads)
    if any(each.opname in _HANDLERS for each in instructions):
        return _Code(f"{code.co_name} handles exceptions, or has a context", None, reads)
    return _Code(None, None, reads)


def _global_reads(instructions: list[dis.Instruction]) -> Iterator[tuple[str, ...]]:
    """Such as ("np", "random", "rand")."""
    names: tuple[str, ...] = ()
    for each in instructions:
        if names and each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names += (each.argval,)
            continue
        if names:
            yield names
        names = (each.argval,) if each.opname in ("LOAD_GLOBAL", "IMPORT_NAME") else ()


def _reads_random(names: tuple[str, ...], variables: dict[str, object]) -> bool:
    """Whether a global variable, an attribute of it, or a module that is imported, is a source of random numbers."""
    first, *rest = names
    value = variables.get(first, sys.modules.get(first))
    for name in rest:
        if _is_random(value):
            return True
        read = getattr if isinstance(value, types.ModuleType) else inspect.getattr_static
        value = read(value, name, None)
    return _is_random(value)


_RANDOM_MODULES = ("random", "secrets", "numpy.random")
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)


def _is_random(value: object) -> bool:
    """Whether it is a module, a generator or a function of random numbers (PyTorch's become nodes of the graph)."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_random, value))
    if isinstance(value, dict):
        return any(map(_is_random, value.values()))
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        value = value.__self__
    if isinstance(value, _GENERATORS):
        return True
    if isinstance(value, types.ModuleType):
        return value.__name__ in _RANDOM_MODULES
    home = value.__module__ if isinstance(value, (type, types.FunctionType)) else None
    return home is not None and (home in _RANDOM_MODULES or home.startswith("numpy.random."))
