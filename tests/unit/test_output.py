"""What has been written and who has read it."""

import os
import threading

from hpcdist._monitor import output


def test_a_pipe_is_awaited_until_it_is_empty() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"last words")
        got: list[bytes] = []
        reader = threading.Timer(0.1, lambda: got.append(os.read(reading, 100)))
        reader.start()
        output.await_reader(writing, 30)
        assert got == [b"last words"]
        reader.join()
    finally:
        os.close(reading)
        os.close(writing)


def test_a_pipe_that_nobody_reads_is_given_up() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"last words")
        output.await_reader(writing, 0.05)
        assert os.read(reading, 100) == b"last words"
    finally:
        os.close(reading)
        os.close(writing)


def test_what_is_no_pipe_is_not_awaited() -> None:
    with open(os.devnull, "w") as null:
        output.await_reader(null.fileno(), 30)
