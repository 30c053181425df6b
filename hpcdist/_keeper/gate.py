"""What stands for process 1 on a login host that it reaches by ssh: `SlurmManager(8, via="login")`.

Jobs dial this host, and their connections go on through the ssh to process 1: what passes is TLS
from end to end. Beside that the gate keeps the runs' folders, which the jobs see and process 1 does
not: it writes what process 1 sends, and sends what jobs leave there. It ends with the ssh.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hpcdist import _config
from hpcdist._keeper import folders
from hpcdist._keeper.installed_mpi import MpiNotFound, find_mpi
from hpcdist._keeper.keeper_link import checkout
from hpcdist._keeper.processes import CHUNK, Op, pack, unpack
from hpcdist._keeper.ssh_keeper import PREAMBLE
from hpcdist._transport import doors, network, tls
from hpcdist._transport.network import Address
from hpcdist._wire import greeting

_LOOK_EVERY = 0.5  # seconds, at what jobs leave in their folders
_CALLING = 10.0
_WRITING = 4.25  # seconds: a script may be about to write its exit file into a folder
_HERE = "127.0.0.1"
EXIT = "exit"  # the file that a job's script leaves


class Gate:
    """The gate of one launch.

    Args:
        outgoing: The way to process 1.
    """

    def __init__(self, outgoing: int) -> None:
        self._out = outgoing
        self._servers: dict[int, list[asyncio.Server]] = {}  # by the port that leads to process 1
        self._watched: dict[str, dict[str, str]] = {}  # folders, and what was told of their files
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, incoming: int) -> None:
        """Do what process 1 says, until it says no more."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        file = os.fdopen(incoming, "rb", 0)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        os.write(self._out, PREAMBLE)
        self._send(ev="hello", **_about())
        self._begin(self._look_after_folders())
        buffer = bytearray()
        while data := await reader.read(CHUNK):
            buffer += data
            for op in unpack(buffer):
                self._begin(self._obey(op))

    def _begin(self, what: Any) -> None:
        task = asyncio.ensure_future(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, **event: object) -> None:
        data = pack(event)
        os.set_blocking(self._out, True)  # it may share its mode with what comes in
        while data:
            data = data[os.write(self._out, data) :]

    async def _obey(self, op: Op) -> None:
        try:
            answer = await getattr(self, f"_do_{op['op']}")(**op["what"])
        except (OSError, ValueError, MpiNotFound) as exc:
            self._send(ev="done", id=op["id"], error=str(exc))
        else:
            self._send(ev="done", id=op["id"], answer=answer)

    # What process 1 may ask for

    async def _do_find(self, python: Sequence[str], dir: str) -> dict[str, Any]:
        """Find the MPI of the workers' interpreter, and whether their folder is there."""
        found: dict[str, Any] = {"is_dir": os.path.isdir(dir)}
        try:
            mpi = await asyncio.to_thread(find_mpi, python)
        except MpiNotFound as exc:
            return found | {"no_mpi": str(exc)}
        lacks = None if mpi.lacks is None else str(mpi.lacks)
        told = [mpi.family, mpi.version, mpi.mpiexec, mpi.is_wheel, lacks]
        return found | {"mpi": told}

    async def _do_open(self, port: int, interface: str | None) -> list[Address]:
        """Let jobs dial this host, on the way to a port of it that leads to process 1."""

        async def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await _join((reader, writer), await asyncio.open_connection(_HERE, port))

        listeners = network.listen(interface)
        targets: list[Address] = [listener.getsockname()[:2] for listener in listeners]
        self._servers[port] = [await asyncio.start_server(come, sock=each) for each in listeners]
        return targets

    async def _do_call(self, targets: Sequence[Address], port: int) -> None:
        """Dial one that cannot dial this host, and let process 1 believe that it had."""
        plain = [(host, number) for host, number in targets]
        sock = await asyncio.to_thread(network.dial, plain, lambda sock, _: sock, _CALLING)
        sock.setblocking(False)
        there = await asyncio.open_connection(sock=sock)
        self._begin(_join(there, await asyncio.open_connection(_HERE, port)))

    async def _do_make(self, folder: str) -> None:
        """Make the folder of a run, for nobody but its user, and watch it from now on."""
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.mkdir(folder, 0o700)
        os.chmod(folder, 0o700)  # whatever the umask
        self._watched[folder] = {}

    async def _do_write(self, path: str, text: str, mode: int) -> None:
        """Write a file of a run's folder; it is there as a whole, or not at all."""
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.replace(path + ".new", path)

    async def _do_number(self, folder: str, folders: Sequence[str]) -> None:
        """Let a job array find its tasks' folders by their numbers."""
        os.mkdir(os.path.join(folder, "tasks"), 0o700)
        for number, target in enumerate(folders):
            os.symlink(target, os.path.join(folder, "tasks", str(number)))

    async def _do_tail(self, path: str, n: int) -> list[str]:
        """Return the last lines of a file; of none, nothing."""
        return folders.last_lines(path, n)

    async def _do_forget(self, folder: str) -> None:
        """Remove the folder of a run."""
        self._watched.pop(folder, None)
        await asyncio.to_thread(folders.remove, folder, _WRITING)

    # What jobs leave

    async def _look_after_folders(self) -> None:
        while True:
            for folder, told in list(self._watched.items()):
                for name, text in _left(folder):
                    if told.get(name) != text:
                        told[name] = text
                        self._send(ev="file", folder=folder, name=name, text=text)
            await asyncio.sleep(_LOOK_EVERY)


def _left(folder: str) -> list[tuple[str, str]]:
    """Return the files that a job has left for process 1, by their names."""
    names = [EXIT]
    with contextlib.suppress(OSError):
        inside = os.listdir(os.path.join(folder, doors.FOLDER))
        names += [f"{doors.FOLDER}/{name}" for name in inside if not name.endswith(".new")]
    found = []
    for name in names:
        with contextlib.suppress(OSError), open(os.path.join(folder, name)) as file:
            if text := file.read():
                found.append((name, text))
    return found


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _join(one: Ends, other: Ends) -> None:
    """Pass on what two connections say to each other, until either ends."""
    for _, writer in (one, other):
        tls.keep_alive(writer.get_extra_info("socket"))
    ways = [_pass_on(one[0], other[1]), _pass_on(other[0], one[1])]
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for _, writer in (one, other):
            writer.close()  # what it was given still leaves


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()


def _about() -> dict[str, Any]:
    return {
        **greeting.about(),
        "executable": sys.executable,
        "package": checkout(),
        "user": getpass.getuser(),
        "home": os.path.expanduser("~"),
        "jobs": os.path.join(os.path.abspath(_config.setting("dir")), "jobs"),
    }


def main() -> NoReturn:
    """Be the gate. Standard input and output are moved away, so that no child can inherit them."""
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    os.umask(0o077)
    with contextlib.suppress(OSError):  # process 1 is gone
        asyncio.run(Gate(outgoing).serve(incoming))
    os._exit(0)
