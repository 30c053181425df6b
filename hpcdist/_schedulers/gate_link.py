"""The way to the gate on a login host: one ssh of ours, which all others share."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shlex
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._contract.managers import Settings
from hpcdist._errors import LaunchError
from hpcdist._keeper import folders
from hpcdist._keeper.keeper_link import checkout
from hpcdist._keeper.leash import communicate
from hpcdist._keeper.processes import Op
from hpcdist._managers.ssh_link import Options, SSHConnection, command, keeper_command, unlike
from hpcdist._runtime.node import Node
from hpcdist._schedulers.plan import Via
from hpcdist._transport.network import Address
from hpcdist._wire.greeting import Hello

PHASE = "connecting by ssh"
_GATE = "hpcdist._keeper.gate"
_ANSWERING = 60.0  # looking for an MPI takes some time
_FORWARDING = 20.0


class GateLink:
    """An ssh to a login host, with a gate at its other end.

    Args:
        node: Whose it is.
        via: Where it leads.
        settings: Of the launch.
        on_file: Called with a file that a job has left: its folder, its name, its text.
    """

    def __init__(
        self, node: Node, via: Via, settings: Settings, on_file: Callable[[str, str, str], None]
    ) -> None:
        self._node = node
        self._via = via
        self._settings = settings
        self._on_file = on_file
        self._folder = folders.private()
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()  # guards the three below
        self._answers: dict[int, Op] = {}
        self._connection: SSHConnection | None = None
        self._over = False  # nobody waits for it any more

    @property
    def alive(self) -> bool:
        """Whether the gate is there."""
        return self._connection is not None

    def begin(self) -> Hello:
        """Connect; return what the gate says of itself.

        Raises:
            LaunchError: There is no ssh, no such host, no such Python there, or no such hpcdist.
        """
        settings, via = self._settings, self._via
        remote = keeper_command(
            settings.keeper, settings.exeflags, checkout(), settings.allocator, _GATE
        )
        argv = command(via.machine, self._options("yes"), remote, None)
        try:
            connection = SSHConnection(self._node, via.machine, self._options(), argv)
        except OSError as exc:
            fix = "install an ssh client here, or name one by ssh="
            raise self.error(f"{argv[0]} cannot be run: {exc.strerror}", fix) from exc
        with self._changed:
            if self._over:
                connection.kill()
            self._connection = connection
        self._node.progress.call_later(settings.timeout, lambda: _give_up(connection))
        try:
            hello = connection.meet()
            if wrong := unlike(hello):
                raise self.error(wrong, "choose its interpreter with python=")
        except LaunchError:
            self._connection = None
            connection.drop()
            raise
        connection.follow()
        self._node.progress.register(connection.fileno(), self._on_event, select.EPOLLIN)
        return hello

    def cut(self) -> None:
        """End a connection that is not there yet: nobody waits for it any more."""
        with self._changed:
            self._over = True
            connection = self._connection
        if connection is not None and connection.hello is None:
            connection.kill()

    def error(self, text: str, fix: str = "") -> LaunchError:
        """Make the error for a host that will not do."""
        return LaunchError(f"{self._via.machine}: {text}", phase=PHASE, fix=fix)

    # What the gate does

    def ask(self, op: str, **what: object) -> Any:
        """Have the gate do something; return its answer.

        Raises:
            ConnectionError: It is not there any more.
            OSError: It could not, in its words.
        """
        number = next(self._numbers)
        connection = self._connection
        if connection is None:
            raise ConnectionError(f"the ssh connection to {self._via.machine} has ended")
        connection.send({"op": op, "id": number, "what": what})
        with self._changed:
            self._changed.wait_for(
                lambda: number in self._answers or self._connection is not connection, _ANSWERING
            )
            said = self._answers.pop(number, None)
            ended = self._connection is not connection
        if said is None:
            late = f"the gate on {self._via.machine} has not answered within {_ANSWERING:g} s"
            raise ConnectionError(connection.gone if ended else late)
        if "error" in said:
            raise OSError(f"on {self._via.machine}: {said['error']}")
        return said["answer"]

    def _on_event(self, _: int) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            events = connection.receive()
        except EOFError:
            self._drop(connection)
            return
        for event in events:
            if event["ev"] == "file":
                self._on_file(event["folder"], event["name"], event["text"])
            elif event["ev"] == "done":
                with self._changed:
                    self._answers[event["id"]] = event
                    self._changed.notify_all()

    # What goes through the ssh beside it

    def forward(self, door: Address) -> int:
        """Let a port of that host lead to a door of this one; return its number.

        Raises:
            LaunchError: Its sshd does not allow it.
        """
        target = f"[{door[0]}]:{door[1]}" if ":" in door[0] else f"{door[0]}:{door[1]}"
        machine = self._via.machine
        port = [] if machine.port is None else ["-p", str(machine.port)]
        argv = [*self._options().ssh, *self._options().flags, *port, "-O", "forward"]
        argv += ["-R", f"0:{target}", "--", machine.target]
        done = communicate(argv, _FORWARDING, env=os.environ)
        if done.status or not done.out.strip().isdecimal():
            said = done.err.strip() or done.out.strip()
            raise self.error(
                f"its sshd forwards no port: {said}",
                "links come by way of it: its administrator has to set AllowTcpForwarding",
            )
        return int(done.out)

    def reaching(self, argv: Sequence[str]) -> list[str]:
        """Return the command of this host that runs another one there."""
        return command(self._via.machine, self._options(), f"exec {shlex.join(argv)}", None)

    def _options(self, master: str = "") -> Options:
        flags = ["-o", f"ControlPath={self._folder}/ssh"]
        if master:
            flags += ["-o", f"ControlMaster={master}"]
        return Options(self._via.ssh, tuple(flags), False, self._settings.timeout)

    # Its end

    def close(self) -> None:
        """End the connection, and with it all that goes through it."""
        connection = self._connection
        if connection is not None:
            self._drop(connection)
        folders.remove(self._folder)

    def _drop(self, connection: SSHConnection) -> None:
        with self._changed:
            if self._connection is not connection:
                return
            self._connection = None
            self._changed.notify_all()
        with contextlib.suppress(KeyError, OSError):
            self._node.progress.unregister(connection.fileno())
        connection.close()
        self._node.turns.background(lambda: _reap(connection))


def _give_up(connection: SSHConnection) -> None:
    if connection.hello is None and connection.process.poll() is None:
        connection.kill()


def _reap(connection: SSHConnection) -> None:
    """Let the ssh leave; make it, if it does not."""
    connection.kill()
    connection.wait()
