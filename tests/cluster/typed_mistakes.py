"""Mistakes of a user's program that type checkers find.

`make lint` checks it with mypy and pyright: to both, a mark where nothing is wrong is an error,
too. Nothing runs it.
"""

from __future__ import annotations

from hpcdist import (
    Executor,
    Future,
    JobExecutor,
    JobFuture,
    RemoteChannel,
    RemoteValue,
    bcast,
    everywhere,
    fetch,
    pmap,
    remote,
    remotecall,
    remotecall_fetch,
    spawn,
)


def length(text: str) -> float:
    return len(text) / 2


async def length_soon(text: str) -> float:
    return length(text)


@everywhere
def shout(word: str) -> str:
    return word.upper()


def calls() -> None:
    future: Future[str] = remotecall(length, 2, "four")  # type: ignore[arg-type]
    value: str = fetch(spawn(length, "four"))  # type: ignore[assignment]
    soon: str = remotecall_fetch(length_soon, 2, "four")  # type: ignore[assignment]
    print(future, value, soon, remote(length)("four").upper())  # type: ignore[attr-defined]


def maps() -> None:
    words: list[str] = pmap(length, ["four"])  # type: ignore[arg-type]
    pmap(length, ["four"], batchsize=3)  # type: ignore[call-overload]
    print(words)


def channels(numbers: RemoteChannel[int]) -> None:
    numbers.put("one")  # type: ignore[arg-type]
    word: str = numbers.take()  # type: ignore[assignment]
    print(word)


def values() -> None:
    table: RemoteValue[list[str]] = bcast([1, 2])  # type: ignore[list-item]
    word: str = bcast(3).fetch()  # type: ignore[assignment]
    print(table, word)


def functions() -> None:
    shout(3)  # type: ignore[arg-type]
    number: int = shout("a")  # type: ignore[assignment]
    print(number)


def executors(jobs: JobExecutor) -> None:
    with Executor() as executor:
        word: str = executor.submit(length, "four").result()  # type: ignore[assignment]
    future: JobFuture[str] = jobs.submit(length, "four")  # type: ignore[arg-type]
    jobs.submit(length, 4)  # type: ignore[arg-type]
    print(word, future)
