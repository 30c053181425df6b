"""Frames, pickled values, functions by id, and the greeting."""

from __future__ import annotations

import secrets
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._wire import codec, frames, functions, greeting

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
    assert codec.met == []


def test_owned_buffers_do_not_follow_their_source() -> None:
    import numpy as np

    array = np.zeros(10_000)
    payload = codec.dumps(array).own()
    array[:] = 1
    assert codec.loads(payload.body, payload.buffers).sum() == 0


def test_a_named_function_is_looked_up_at_each_call() -> None:
    described = functions.describe(secrets.token_hex)
    assert described is not None
    functions.define(described.ident, described.definition)
    assert functions.function(described.ident) is secrets.token_hex


def test_a_function_of_the_same_code_keeps_its_own_captures() -> None:
    adders = [lambda x, k=k: x + k for k in range(3)]
    assert [functions.describe(f) for f in adders] == [None, None, None]  # travel whole


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
