"""The state that a module can change when it is called: what it was before, whether it changed, and restoring it."""

from __future__ import annotations

import enum
import functools
import logging
import pathlib
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Larger tensors are not cloned; whether they changed is read from PyTorch's version counter.
_LARGEST_CLONE = 1 << 20
# A norm refers to a few dozen objects; one with a transformers config to a few hundred.
_MOST_OBJECTS = 20_000
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, range, slice, enum.Enum, re.Pattern, pathlib.PurePath,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.GenericAlias, weakref.ReferenceType,
    logging.Logger, type(Ellipsis), type(NotImplemented), functools._lru_cache_wrapper,
)  # fmt: skip
_DESCRIPTORS = (
    types.FunctionType, staticmethod, classmethod, property, functools.cached_property, types.MemberDescriptorType,
    types.GetSetDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType,
)  # fmt: skip
# Entries of a module's `__dict__` that contain its tensors and children by name.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class UnwatchableError(Exception):
    """An object that a module refers to can neither be copied nor compared; the message is the reason."""


class Snapshot:
    """The state of everything that a module refers to, at the time of construction.

    It follows attributes, parameters, buffers, children, containers, objects with attributes, the variables that
    functions enclose, and the data attributes of classes. It does not follow the global variables of Python modules,
    nor the objects of PyTorch other than modules, tensors and generators.
    """

    def __init__(self, module: nn.Module, *, classes: bool = True) -> None:
        """Read the state.

        Args:
            module: the module; it is not changed.
            classes: also the data attributes of classes, which all copies share.

        Raises:
            UnwatchableError: it refers to an object whose state cannot be read, or to too many objects.
        """
        self._records: list[_Record] = []
        kept: dict[int, Any] = {}
        waiting: list[tuple[str, Any]] = [("", module)]
        while waiting:
            path, value = waiting.pop()
            if is_atom(value) or id(value) in kept:
                continue
            if len(kept) >= _MOST_OBJECTS:
                raise UnwatchableError(f"it refers to more than {_MOST_OBJECTS:,} objects, which cannot be watched")
            kept[id(value)] = value
            for record in _records_of(path, value, classes):
                self._records.append(record)
                waiting += record.inner()
        self._kept = kept

    def changed(self) -> str | None:
        """The name of the first thing that is not as it was, such as `stats['calls']`; None if all is."""
        return next((name for name in (record.difference() for record in self._records) if name is not None), None)

    def restore(self) -> None:
        """Write back what changed."""
        for record in self._records:
            if record.difference() is not None:
                record.restore()


def is_atom(value: Any) -> bool:
    """Whether a value has no state of its own that a call could change."""
    if isinstance(value, _ATOMS) or type(value) is object:
        return True
    if isinstance(value, nn.Module | Tensor | torch.Generator | torch.Size | types.FunctionType | types.MethodType):
        return False
    return type(value).__module__.partition(".")[0] in ("torch", "typing")


def is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class written in Python that has nothing but attributes."""
    cls = type(value)
    if isinstance(value, type) or not (hasattr(value, "__dict__") or slots_of(value)):
        return False
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return False
    try:
        object.__new__(cls)
    except TypeError:  # a class written in C is among the bases
        return False
    return True


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its `__dict__` and in its slots."""
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots_of(value)}}


def slots_of(value: Any) -> list[str]:
    """The names in `__slots__` that have a value."""
    names: list[str] = []
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


class _Record:
    """The content of one object: `read` gives it as pairs of a name and a value, `write` puts it back."""

    def __init__(
        self,
        path: str,
        read: Callable[[], list[tuple[str, Any]]],
        write: Callable[[list[tuple[str, Any]]], None],
        follow: bool = True,
    ) -> None:
        self.path, self.read, self.write, self.follow = path, read, write, follow
        self.saved = read()

    def inner(self) -> Iterator[tuple[str, Any]]:
        """The values to read next, with their paths."""
        return ((self.path + name, value) for name, value in self.saved) if self.follow else iter(())

    def difference(self) -> str | None:
        now = self.read()
        for (name, before), (other, after) in zip(self.saved, now, strict=False):
            if name != other or not _same(before, after):
                return tidy(self.path + name)
        if len(now) != len(self.saved):
            longer = max(now, self.saved, key=len)
            return tidy(self.path + longer[min(len(now), len(self.saved))][0])
        return None

    def restore(self) -> None:
        self.write(self.saved)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    if isinstance(a, bool | int | complex | str | bytes):
        return bool(a == b)
    if isinstance(a, types.MethodType):  # made anew at each access
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return False


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tidy(path: str) -> str:
    """A path as a user writes it: parameters, buffers and children are attributes."""
    for registry in _REGISTRIES:
        path = re.sub(rf"(^|\.){registry}\['([^']*)'\]", r"\1\2", path)
    return path.removeprefix(".")


def _records_of(path: str, value: Any, classes: bool) -> Iterator[_Record]:
    if isinstance(value, Tensor):
        yield _tensor(path, value)
        if getattr(value, "__dict__", None):
            yield _attributes(path, value)
    elif isinstance(value, np.ndarray):
        yield _Record(path, lambda: [("", value.copy())], lambda saved: np.copyto(value, saved[0][1]), follow=False)
    elif isinstance(value, dict | types.MappingProxyType):
        yield _mapping(path, value)
    elif isinstance(value, list | deque | bytearray):
        yield _sequence(path, value)
    elif isinstance(value, tuple | frozenset):
        yield _Record(path, lambda: [(f"[{i}]", item) for i, item in enumerate(value)], _nothing)
    elif isinstance(value, set):
        yield _set(path, value)
    elif isinstance(value, types.FunctionType):
        yield from _function(path, value)
    elif isinstance(value, types.MethodType):
        yield _Record(path, lambda: [("", value.__self__), ("", value.__func__)], _nothing)
    elif isinstance(value, functools.partial):
        yield _Record(path, lambda: [("", value.func), ("", value.args), ("", value.keywords)], _nothing)
    elif isinstance(value, torch.Generator):
        yield _generator(path, value)
    elif isinstance(value, random.Random):
        yield _Record(path, lambda: [("", value.getstate())], lambda saved: value.setstate(saved[0][1]), follow=False)
    elif not (hasattr(value, "__dict__") or slots_of(value)):
        yield _opaque(path, value)
    if not isinstance(value, Tensor | types.FunctionType) and (hasattr(value, "__dict__") or slots_of(value)):
        yield _attributes(path, value)
        if classes:
            yield from _classes(type(value))


def _nothing(saved: list[tuple[str, Any]]) -> None:
    """What cannot change needs no restoring."""


def _tensor(path: str, value: Tensor) -> _Record:
    watched = value.numel() > _LARGEST_CLONE or value.is_meta or value.layout != torch.strided or value.is_quantized

    def read() -> list[tuple[str, Any]]:
        traits = ("", (tuple(value.shape), value.requires_grad))
        if watched:
            return [traits, ("", None if value.is_inference() else value._version)]
        return [traits, ("", value.detach().clone())]

    def write(saved: list[tuple[str, Any]]) -> None:
        if watched:
            return
        data = saved[1][1]
        with torch.no_grad():
            if value.shape == data.shape:
                value.data.copy_(data)
            else:
                value.data = data.clone()
        if value.is_leaf:
            value.requires_grad_(saved[0][1][1])

    return _Record(path, read, write, follow=False)


def _generator(path: str, value: torch.Generator) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        value.set_state(saved[0][1])

    return _Record(path, lambda: [("", value.get_state())], write, follow=False)


def _mapping(path: str, value: Any) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        if isinstance(value, dict):
            value.clear()
            for key, (_, item) in zip(keys, saved, strict=True):
                dict.__setitem__(value, key, item)

    keys = list(value)
    return _Record(path, lambda: [(f"[{key!r}]", item) for key, item in value.items()], write)


def _sequence(path: str, value: Any) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        value.clear()
        value.extend(item for _, item in saved)

    return _Record(path, lambda: [(f"[{i}]", item) for i, item in enumerate(value)], write)


def _set(path: str, value: set[Any]) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        value.clear()
        value.update(saved[0][1])

    return _Record(path, lambda: [("", tuple(sorted(value, key=id)))], write)


def _function(path: str, value: types.FunctionType) -> Iterator[_Record]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        yield _cell(f"{path} (variable {name})", cell)
    if value.__defaults__ or value.__kwdefaults__:
        defaults = (value.__defaults__, value.__kwdefaults__)
        yield _Record(path, lambda: [(" (default of an argument)", item) for item in defaults], _nothing)
    if vars(value):
        yield _attributes(path, value)


def _cell(path: str, cell: types.CellType) -> _Record:
    def read() -> list[tuple[str, Any]]:
        try:
            return [("", cell.cell_contents)]
        except ValueError:  # a variable without a value yet
            return []

    def write(saved: list[tuple[str, Any]]) -> None:
        if saved:
            cell.cell_contents = saved[0][1]
        else:
            del cell.cell_contents

    return _Record(path, read, write)


def _attributes(path: str, value: Any) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        before = {name.removeprefix("."): item for name, item in saved}
        for name in slots_of(value):
            if name not in before:
                object.__delattr__(value, name)
        for name in slots:
            if name in before:
                object.__setattr__(value, name, before.pop(name))
        if hasattr(value, "__dict__"):
            value.__dict__.clear()
            value.__dict__.update(before)

    slots = slots_of(value)
    return _Record(path, lambda: [(f".{name}", item) for name, item in vars_of(value).items()], write)


def _classes(cls: type) -> Iterator[_Record]:
    """The data attributes of a class and its bases, but not those of PyTorch and of classes written in C."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins") and base.__flags__ & (1 << 9):
            names = [
                name
                for name, item in vars(base).items()
                if not (name.startswith("__") or name == "_abc_impl" or isinstance(item, _DESCRIPTORS))
            ]
            if names:
                yield _class(base, names)


def _class(base: type, names: list[str]) -> _Record:
    def write(saved: list[tuple[str, Any]]) -> None:
        for name, item in saved:
            if not _same(vars(base).get(name.removeprefix(".")), item):
                setattr(base, name.removeprefix("."), item)

    return _Record(base.__qualname__, lambda: [(f".{name}", vars(base).get(name)) for name in names], write)


def _opaque(path: str, value: Any) -> _Record:
    """An object that Python cannot look into: compared by what it is pickled as."""

    def read() -> list[tuple[str, Any]]:
        return [("", repr(value.__reduce_ex__(4)))]

    try:
        return _Record(path, read, _nothing, follow=False)
    except Exception as error:  # the object's own code decides what it raises
        raise UnwatchableError(
            f"its attribute {tidy(path)} ({type(value).__name__}) cannot be copied, so that a call could change the "
            "model"
        ) from error
