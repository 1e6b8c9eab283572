"""A pickle read without running it: nothing is imported, called or built, and a hostile one costs little.

Calls become records of what would have been called (`Made`); plain values stay what they are. Which names a pickle
may mention at all is the caller's business, so that one that would do harm is refused by name.

It is the standard library's own unpickler in Python. The one in C (4 s instead of 10 for the 230 000 pieces of a
large ``.metadata``) reserves whatever memory a forged number asks for: eight bytes could end the watcher, and the
training beside it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

# A byte can ask for about 100 bytes of objects, so both the bytes and the objects are counted. Metadata of DCP has
# 144 bytes and 36 objects a piece: 230 000 pieces fit, which is a model of 80 layers with its optimizer on 100 ranks.
# They take 590 MiB while they are read, and nothing but lists, marks or tuples up to the limits takes 700 (measured).
LARGEST = 32 * 2**20
MOST_OBJECTS = 10**7
MOST_DIMENSIONS = 64  # of a size, or parts of a key: a long list that many records share would take for ever

_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})


class Refused(Exception):  # noqa: N818 - its text is the name that was refused
    """The pickle mentions a name that it must not."""


class Named:
    """A class, function or constant that the pickle mentions: only its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What a call would have made: whose, its arguments, and the state that was set on it (None when none was)."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None


PERSISTENT = "a persistent id"  # the name of what `torch.save` stores beside the pickle: storages


def load(data: bytes | bytearray, allowed: Callable[[str], bool]) -> Any:
    """Return what a pickle says, in dictionaries, lists, tuples, plain values, `Named` and `Made`.

    Parameters
    ----------
    data
        The pickle, at most `LARGEST` bytes.
    allowed
        Whether a dotted name may be mentioned.

    Raises
    ------
    Refused
        When a name is not allowed.
    Exception
        Of many kinds, when it is damaged or hostile.
    """
    if len(data) > LARGEST:
        raise pickle.UnpicklingError(f"{len(data)} bytes, at most {LARGEST} are read")
    return _Unpickler(io.BytesIO(data), allowed).load()


def _counted(handler: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(self: _Unpickler) -> None:
        self.objects += 1
        if self.objects > MOST_OBJECTS:
            raise pickle.UnpicklingError(f"more than {MOST_OBJECTS} objects")
        handler(self)

    return counted


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, allowed: Callable[[str], bool]) -> None:
        super().__init__(stream)
        self.allowed = allowed
        self.objects = 0

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if not self.allowed(full):
            raise Refused(full)
        return Named(full)

    def persistent_load(self, pid: Any) -> Any:
        return Made(PERSISTENT, pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, dict):  # a dictionary's attributes are none of our business
            raise pickle.UnpicklingError(f"sets the state of a {type(target).__name__}")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _fill(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _fill(self.stack[-1], [key, value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        _extend(self.stack[-1], items)

    def load_append(self) -> None:
        item = self.stack.pop()
        _extend(self.stack[-1], [item])


def _made(named: Any, arguments: Any) -> Any:
    if isinstance(named, Made):  # a method, which `getattr` would have found
        return Made(f"a call of {named.name}", arguments)
    if not isinstance(named, Named) or type(arguments) is not tuple:
        raise pickle.UnpicklingError("calls what is no name")
    if named.name in _DICTIONARIES:
        return {}
    if named.name == "torch.Size":
        return tuple(arguments[0][:MOST_DIMENSIONS]) if arguments else ()
    return Made(named.name, arguments)


def _fill(target: Any, items: list[Any]) -> None:
    if isinstance(target, Made):
        return  # a dictionary of a class that we do not know
    if not isinstance(target, dict):
        raise pickle.UnpicklingError(f"sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not _is_key(key):
            raise pickle.UnpicklingError(f"a {type(key).__name__} is the key of a dictionary")
        target[key] = value


def _is_key(value: Any) -> bool:
    """Whether hashing it is cheap: a tuple of tuples of tuples takes for ever, and so do chosen large numbers."""
    if type(value) is tuple:
        return len(value) <= MOST_DIMENSIONS and all(type(part) is not tuple and _is_key(part) for part in value)
    if type(value) is int:
        return abs(value) < 2**60
    return value is None or type(value) in (str, bool, float, Named, Made)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Made):
        raise pickle.UnpicklingError(f"appends to a {type(target).__name__}")


# What `pickle.dump` uses for tensors, numbers, names and dictionaries; no extensions, no copies of the stack's top.
_PLAIN = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES,
)  # fmt: skip
_MAKING = (
    pickle.MARK, pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.EMPTY_TUPLE, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.GLOBAL,
    pickle.STACK_GLOBAL, pickle.BINPERSID,
)  # fmt: skip
_OURS = {
    pickle.REDUCE: _counted(_Unpickler.load_reduce),
    pickle.NEWOBJ: _counted(_Unpickler.load_reduce),
    pickle.BUILD: _Unpickler.load_build,
    pickle.SETITEMS: _Unpickler.load_setitems,
    pickle.SETITEM: _Unpickler.load_setitem,
    pickle.APPENDS: _Unpickler.load_appends,
    pickle.APPEND: _Unpickler.load_append,
}
_Unpickler.dispatch = {
    **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN},
    **{code[0]: _counted(pickle._Unpickler.dispatch[code[0]]) for code in _MAKING},
    **{code[0]: handler for code, handler in _OURS.items()},
}
