"""Frames, pickled values, functions by id, and the greeting."""

from __future__ import annotations

import copy
import secrets
import socket
import threading
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist import _errors
from hpcdist._wire import codec, frames, greeting
from hpcdist._wire.functions import Functions

buffers = st.lists(st.binary(max_size=200), max_size=5)


@given(
    kind=st.sampled_from([frames.CALL, frames.RESULT, frames.CONTROL]),
    ident=st.integers(0, 2**64 - 1),
    aux=st.integers(0, 2**64 - 1),
    body=st.binary(max_size=300),
    parts=buffers,
)
def test_a_message_reads_as_it_was_packed(
    kind: int, ident: int, aux: int, body: bytes, parts: list[bytes]
) -> None:
    data, views = frames.pack(kind, 0, ident, aux, body, parts)
    found = frames.HEAD.unpack_from(data)
    count, length = found[2], found[3]
    assert (found[0], found[4], found[5]) == (kind, ident, aux)
    rest = data[frames.HEAD_SIZE :]
    assert len(rest) == length
    assert frames.sizes(rest, count) == [len(p) for p in parts]
    assert rest[8 * count :] == body
    assert [bytes(v) for v in views] == parts


def test_a_long_body_travels_apart() -> None:
    body = secrets.token_bytes(frames.BODY_MAX + 1)
    data, views = frames.pack(frames.CALL, frames.FETCH, 1, 2, body)
    assert len(data) < 100
    assert data[1] & frames.BODY_APART
    assert bytes(views[0]) == body


@pytest.mark.timeout(240)
@given(st.recursive(st.integers() | st.text() | st.binary() | st.none(), st.lists))
def test_values_survive(value: Any) -> None:
    payload = codec.dumps(value)
    assert codec.loads(payload.body, payload.buffers) == value


def test_large_buffers_stand_apart_and_small_ones_do_not() -> None:
    import numpy as np

    large, small = np.arange(10_000.0), np.arange(10.0)
    payload = codec.dumps((large, small))
    assert len(payload.buffers) == 1
    again = codec.loads(payload.body, payload.buffers)
    assert (again[0] == large).all()
    assert (again[1] == small).all()


def test_what_cannot_be_pickled_raises_and_leaves_nothing() -> None:
    with pytest.raises(TypeError):
        codec.dumps(threading.Lock())
    assert codec.met.refs == []


def test_owned_buffers_do_not_follow_their_source() -> None:
    import numpy as np

    array = np.zeros(10_000)
    payload = codec.dumps(array).own()
    array[:] = 1
    assert codec.loads(payload.body, payload.buffers).sum() == 0


def test_a_named_function_is_looked_up_at_each_call() -> None:
    sender, receiver = Functions(), Functions()
    described = sender.describe(secrets.token_hex)
    assert described is not None
    receiver.define(described.ident, described.definition)
    assert receiver.function(described.ident) is secrets.token_hex


def test_what_one_process_was_sent_another_does_not_know() -> None:
    one, other = Functions(), Functions()
    described = one.describe(secrets.token_hex)
    assert described is not None
    one.define(described.ident, described.definition)
    with pytest.raises(KeyError):
        other.function(described.ident)


def test_a_process_notices_once_that_a_module_was_reloaded() -> None:
    reloaded: list[str] = []
    one, other = Functions(), Functions()
    one.on_reload.append(reloaded.append)
    for process in (one, other):
        process.describe(secrets.token_hex)
    spec = secrets.__spec__
    secrets.__spec__ = copy.copy(spec)
    try:
        for process in (one, other, one, other):
            process.describe(secrets.token_hex)
    finally:
        secrets.__spec__ = spec
    assert reloaded == ["secrets"]


def test_a_function_of_the_same_code_keeps_its_own_captures() -> None:
    adders = [lambda x, k=k: x + k for k in range(3)]
    assert [Functions().describe(f) for f in adders] == [
        None,
        None,
        None,
    ]  # travel whole


# All code of it travels by value, as it lies in no module.
BY_VALUE = """
def plain(x):
    def inner(y):
        return (lambda z: 1 / z)(y)
    return inner(x)

def closed(k):
    def over(x):
        return [1 / (x * k) for _ in range(1)]
    return over

class Thing:
    def method(self):
        return 1 / 0

    @classmethod
    def of_class(cls):
        return 1 / 0

    @staticmethod
    def of_none():
        return 1 / 0

    class Nested:
        @property
        def value(self):
            return 1 / 0
"""


def nested_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_code(constant)


def codes(value: Any) -> Iterator[CodeType]:
    """All code of a function or a class, nested classes included."""
    if isinstance(value, type):
        for inner in vars(value).values():
            yield from codes(inner)
    inner = getattr(value, "fget", getattr(value, "__func__", value))
    if isinstance(inner, FunctionType):
        yield from nested_code(inner.__code__)


def by_value_space(file: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(BY_VALUE, file, "exec"), space)
    return space


@pytest.mark.parametrize("name", ["plain", "closed", "Thing"])
def test_code_keeps_its_file(name: str) -> None:
    space = by_value_space("/somewhere/experiment.py")
    value = space["closed"](3) if name == "closed" else space[name]
    again = codec.loads(codec.dumps(value).body)
    found = [code.co_filename for code in codes(again)]
    assert found == ["/somewhere/experiment.py"] * len(list(codes(value)))
    assert found


def test_the_same_code_gives_the_same_bytes() -> None:
    # A function's id is the hash of its definition: defined again, it does not travel again.
    first, second = (codec.dumps(by_value_space("a.py")["plain"].__code__) for _ in range(2))
    assert first.body == second.body


def test_an_exception_class_sent_by_value_keeps_its_file() -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    text = "class Odd(Exception):\n    def why(self):\n        return 1 / 0\n"
    exec(compile(text, "/somewhere/odd.py", "exec"), space)
    sent = _errors.encode_error(space["Odd"]("x"), 2)
    cause = _errors.decode_error(sent).cause
    assert type(cause).why.__code__.co_filename == "/somewhere/odd.py"  # type: ignore[attr-defined]


def greet(cookie: bytes, other: bytes) -> tuple[Any, Any]:
    near, far = socket.socketpair()
    found: dict[str, Any] = {}

    def dial() -> None:
        try:
            greeting.dial(far, other, {"kind": "test"}, 5)
        except OSError as exc:
            found["dial"] = exc
        finally:
            far.close()

    thread = threading.Thread(target=dial)
    thread.start()
    with near:
        try:
            found["accept"] = greeting.accept(near, cookie, 5)
        except OSError as exc:
            found["accept"] = exc
    thread.join()
    return found["accept"], found.get("dial")


def test_the_same_cookie_is_greeted() -> None:
    cookie = secrets.token_bytes(16)
    assert greet(cookie, cookie) == ({"kind": "test"}, None)


def test_another_cookie_is_refused() -> None:
    accepted, dialled = greet(secrets.token_bytes(16), secrets.token_bytes(16))
    assert isinstance(accepted, greeting.Refused)
    assert isinstance(dialled, OSError)


@given(st.binary(min_size=56, max_size=80))
def test_rubbish_is_refused(noise: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(noise)
        with pytest.raises(greeting.Refused):
            greeting.accept(near, b"c" * 16, 5)
