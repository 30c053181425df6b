"""Pid 1's end of an ssh connection: its command line, the keeper behind it, and why it failed."""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdist import _config
from hpcdist._errors import LaunchError
from hpcdist._keeper.keeper_link import KeeperLink, checkout
from hpcdist._keeper.processes import describe_status
from hpcdist._keeper.ssh_keeper import PREAMBLE
from hpcdist._managers.ssh_machines import Machine
from hpcdist._runtime.node import Node
from hpcdist._transport.network import Address
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello

_CHUNK = 1 << 16
_CONNECTING = 20.0  # at most; the launch's own timeout may be shorter
_ENDING = 5.0
_SSH_FAILED = 255  # ssh(1), "EXIT STATUS"

# What the interpreter over there runs. Double quotes only, and one line: it passes a shell, and
# csh takes no text of several. A checkout that both hosts see serves where nothing is installed.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + sys.argv[1:]; "
    'sys.version_info < (3, 11) and sys.exit("hpcdist needs Python 3.11, this is " + sys.version); '
    "import importlib.util as u; "
    'u.find_spec("hpcdist") or sys.exit("No module named hpcdist for " + sys.executable); '
    "from {module} import main; main()"
)

# Words of ssh (OpenSSH 8 and 9), of sshd, of shells and of the above, and what helps.
_FIXES = (
    (
        "Host key verification failed",
        "connect once by hand, `{ssh} {target}`: its key is not known",
    ),
    ("Permission denied (", "make `{ssh} -o BatchMode=yes {target} true` work, without a question"),
    ("Could not resolve hostname", "check the name, or explain it in ~/.ssh/config"),
    ("onnection refused", "see whether an sshd runs there, and at which port"),
    ("timed out", "see whether `{ssh} {target}` connects by hand"),
    ("No route to host", "see whether `{ssh} {target}` connects by hand"),
    ("No module named hpcdist", "install it for that interpreter, or choose another by python="),
    ("hpcdist needs Python", "choose another interpreter over there by python="),
)
_NO_PYTHON = "that host has no such interpreter: choose one by python="
_NOT_FORWARDED = "remote port forwarding failed"  # the rest of its line differs by version
_ALLOCATED = re.compile(r"^Allocated port ([0-9]{1,5}) for remote forward")


@dataclass(frozen=True)
class Options:
    """How ssh is used.

    Attributes:
        ssh: The program, with what always follows it.
        flags: More of its options; they win over ours.
        tunnel: Whether links come back over the connection.
        timeout: How long a launch may take, in seconds.
    """

    ssh: tuple[str, ...] = ("ssh",)
    flags: tuple[str, ...] = ()
    tunnel: bool = False
    timeout: float = 60.0


def words(given: Any) -> tuple[str, ...]:
    """Read a program with what follows it, or options: a list of words, or a text as in a shell."""
    return tuple(shlex.split(given) if isinstance(given, str) else map(str, given))


def command(machine: Machine, options: Options, remote: str, door: Address | None) -> list[str]:
    """Write ssh's command line.

    Args:
        remote: The command for the shell over there.
        door: Where process 1 listens, which a port over there is to lead to; None: no such port.
    """
    every = max(1, round(_config.setting("heartbeat")))
    limit = max(every, round(_config.setting("heartbeat_limit")))
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": max(1, round(min(options.timeout, _CONNECTING))),
        "ServerAliveInterval": every,
        "ServerAliveCountMax": max(1, limit // every),
        "ControlMaster": "no",  # an existing one serves, but none of ours outlives us
        "RemoteCommand": "none",
        "RequestTTY": "no",
    }
    if door is None:
        settings |= {"ClearAllForwardings": "yes", "LogLevel": "ERROR"}
    else:  # a shared connection would keep the port, and ssh tells its number at this level
        settings |= {"ControlPath": "none", "LogLevel": "INFO"}
    argv = [*options.ssh, *options.flags]
    argv += [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    if door is not None:
        host = f"[{door[0]}]" if ":" in door[0] else door[0]
        argv += ["-R", f"0:{host}:{door[1]}"]
    if machine.port is not None:
        argv += ["-p", str(machine.port)]
    return [*argv, "--", machine.target, remote]


def keeper_command(
    python: Sequence[str],
    flags: Sequence[str],
    package: str | None,
    env: Mapping[str, str],
    module: str = "hpcdist._keeper.ssh_keeper",
) -> str:
    """Write what the shell over there is to run.

    Args:
        package: A checkout of hpcdist, for a host that has none installed and sees the same.
        env: Variables it starts with; nothing secret, for all over there can see them.
        module: Whose `main` is the other end.
    """
    boot = _BOOT.replace("{module}", module)
    variables = [f"{name}={value}" for name, value in env.items()]
    return "exec env " + shlex.join(
        [*variables, *python, *flags, "-c", boot, *filter(None, [package])]
    )


def unlike(hello: Hello) -> str:
    """Say what keeps the interpreter over there from running our functions; "": nothing."""
    ours = greeting.about()
    for what, theirs, mine in (
        ("Python", _minor(hello["python"]), _minor(ours["python"])),
        ("hpcdist", hello["hpcdist"], ours["hpcdist"]),
    ):
        if theirs != mine:
            return f"{hello['executable']} has {what} {theirs}, this process has {mine}"
    return ""


def own_path(entries: Sequence[str]) -> list[str]:
    """Return the user's part of sys.path: the interpreter over there has the rest of its own."""
    installed = [
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    libraries = (*installed, os.path.join(sys.base_prefix, "lib", "python"))
    own = [entry for entry in entries if not entry.startswith(libraries)]
    return list(dict.fromkeys([*own, *filter(None, [checkout()])]))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


class SSHConnection(KeeperLink):
    """A keeper behind an ssh of ours.

    Args:
        node: Whose it is.
        machine: Where it leads.
        options: How.
        argv: ssh's command line.
    """

    def __init__(self, node: Node, machine: Machine, options: Options, argv: Sequence[str]) -> None:
        self._node = node
        self.machine = machine
        self.options = options
        self.argv = list(argv)
        self.said: deque[str] = deque(maxlen=50)
        self.port: int | None = None  # over there, that leads to our door
        self.hello: Hello | None = None
        self._before: bytearray | None = bytearray()
        self._half_line = b""
        self._followed = False
        self._start(argv, machine.host, both=True, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        self._errors = self.process.stderr.fileno()
        os.set_blocking(self._errors, False)

    @property
    def gone(self) -> str:  # type: ignore[override]
        """Why its world ends with it."""
        last = f": {self.said[-1]}" if self.said else ""
        return f"the ssh connection to {self.machine} ended{last}"

    def meet(self) -> Hello:
        """Wait for the first words of the keeper, and return them.

        Raises:
            LaunchError: There will be none.
        """
        poll = select.poll()
        poll.register(self, select.POLLIN)
        poll.register(self._errors, select.POLLIN)
        while self.hello is None or (self.options.tunnel and self.port is None):
            for fd, _ in poll.poll():
                if fd == self._errors and not self._read_errors():
                    poll.unregister(fd)
            try:
                self.hello = next(iter(self.receive()), self.hello)
            except EOFError:
                raise self._explain() from None
            if any(_NOT_FORWARDED in line for line in self.said):
                raise self._error(
                    "its sshd forwards no port (AllowTcpForwarding): do not use tunnel="
                )
        return self.hello

    def follow(self) -> None:
        """Go on reading what it complains of."""
        self._followed = True
        self._node.progress.register(self._errors, self._on_errors, select.EPOLLIN)

    def _fill(self) -> bool:
        ended = super()._fill()
        if self._before is not None:
            self._before += self._incoming  # what a login shell prints
            self._incoming.clear()
            _, found, rest = self._before.partition(PREAMBLE)
            if found:
                self._incoming += rest
                self._before = None
        return ended

    def _on_errors(self, _: int) -> None:
        if not self._read_errors():
            self._node.progress.unregister(self._errors)

    def _read_errors(self) -> bool:
        """Note what ssh, or whatever it runs, complains of; False at its end."""
        try:
            while data := os.read(self._errors, _CHUNK):
                *lines, self._half_line = (self._half_line + data).split(b"\n")
                self._note(lines)
        except BlockingIOError:
            return True
        except OSError:  # closed
            return False
        self._note([self._half_line] if self._half_line else [])
        self._half_line = b""
        return False

    def _note(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            allocated = _ALLOCATED.match(text)
            if allocated:
                self.port = int(allocated[1])
            elif text:
                self.said.append(text)

    def _explain(self) -> LaunchError:
        """Explain, in ssh's words, why it ended before the keeper spoke."""
        status = self.wait(_ENDING)
        self._read_errors()
        silence = f"ssh ended ({describe_status(status)}) and said nothing"
        words = self.said[-1] if self.said else silence
        if status in (126, 127):  # of the shell over there
            return self._error(words, _NO_PYTHON)
        return self._error(words, None if status == _SSH_FAILED or self.said else "")

    def _error(self, text: str, fix: str | None = None) -> LaunchError:
        if fix is None:
            said = "\n".join([text, *self.said])
            fix = next((fix for sign, fix in _FIXES if sign in said), "")
        return LaunchError(
            f"{self.machine}: {text}",
            phase="connecting by ssh",
            command=self.argv,
            output=list(self.said),
            fix=fix.format(ssh=self.options.ssh[0], target=self.machine.target),
        )

    def wait(self, timeout: float | None = None) -> int:
        """Wait for ssh to leave; make it, if it does not."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()

    def close(self) -> None:
        """Drop the connection. A world that is still up ends."""
        super().close()
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self._read_errors()  # its last words
            if self._followed:
                self._node.progress.unregister(self._errors)
            self.process.stderr.close()
