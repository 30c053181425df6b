"""Workers that come and go by themselves: wherever `hpcdist worker --join FILE` is typed."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from hpcdist import _config, _log
from hpcdist._managers import roster
from hpcdist._managers.base import KeptManager, Settings, WorkerConfig
from hpcdist._managers.door import Door
from hpcdist._managers.world import World
from hpcdist._runtime.node import node
from hpcdist._transport import network
from hpcdist._wire import greeting

if TYPE_CHECKING:
    from hpcdist._managers.launch import Launch

_GREETING = 10.0
# Run beside process 1: when that ends, in whatever way, the join file goes too.
_JANITOR = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], True)"


class ElasticManager(KeptManager):
    """Starts no worker itself: lets in those that come by `hpcdist worker --join FILE`.

    `addprocs` opens the door and returns the workers that have come, at first none; more come at
    any time. `shutdown`, the end of a `with cluster(...)` block, and this process's end close it
    and end them all.

    Args:
        addr: By which address, or interface, of this host they shall come; None: by any.
        port: The port; 0: any that is free.

    Example:
        >>> import hpcdist
        >>> manager = hpcdist.ElasticManager()
        >>> hpcdist.addprocs(manager)
        []
        >>> print("on the other machine, type:", manager.command)
        on the other machine, type: ...
        >>> hpcdist.shutdown()
    """

    on_network = True
    enough = 0

    def __init__(self, addr: str | None = None, port: int = 0) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
            raise ValueError(f"port is a number from 0 to 65535, not {port!r}")
        self.addr = addr
        self.port = port
        self._launch: Launch | None = None

    def __repr__(self) -> str:
        return f"ElasticManager(addr={self.addr!r}, port={self.port})"

    @property
    def join_file(self) -> str:
        """What workers need to come in; for your eyes only. Asking for it opens the door."""
        return self._last().worlds[0].join_file

    @property
    def command(self) -> str:
        """What to type on another machine. Asking for it opens the door."""
        return self._last().worlds[0].command

    @property
    def open_launch(self) -> Launch | None:
        """The launch that lets workers in; None while the door is shut."""
        return self._launch if self._launch is not None and self._launch.pending else None

    def _last(self) -> Launch:
        if self._launch is None:
            from hpcdist._managers import lifecycle

            return lifecycle.launch(self)
        return self._launch

    def default_addprocs_params(self) -> dict[str, Any]:
        """Return what holds where nothing is said: while the door is open, what was said before."""
        defaults = super().default_addprocs_params()
        if self.open_launch is not None:
            last = vars(self.open_launch.settings)
            defaults |= {name: last[name] for name in defaults.keys() & last.keys()}
        return defaults | {"min_workers": None}

    def prepare(self, settings: Settings) -> None:
        """Refuse an address that is not this host's."""
        _interface(self.addr)

    def renew(self, settings: Settings) -> None:
        """Let workers come with other settings from now on."""
        world = self._last().worlds[0]
        assert isinstance(world, ElasticWorld)
        world.renew(settings)

    def start(self, launch: Launch) -> None:
        """Take note of the launch: its door is open."""
        self._launch = launch

    def kill(self, pid: int, config: WorkerConfig) -> None:
        """End our side of the connection to a worker: then the worker's guard ends it."""
        link = node.peers[pid].link
        if link is not None and link.open:
            with socket.socket(fileno=os.dup(link.sock.fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)


class ElasticWorld(World):
    """All workers that come by one join file. Each is alone: there is no MPI between them."""

    had_enough = False
    janitor: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        """Those of its workers that are there."""
        return [p for p in self.registered if roster.book[p].state is not roster.State.GONE]

    @property
    def word(self) -> str:
        """How it stands: workers may come."""
        return "RUNNING"

    def prepare(self) -> None:
        """Make its folder where other hosts may see it, open its door and write its join file."""
        base = os.path.abspath(_config.setting("dir"))
        os.makedirs(base, mode=0o700, exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix="elastic-", dir=base)
        self.janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _JANITOR, self.folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert isinstance(self.manager, ElasticManager)
        self._door = Door.on_network(_interface(self.manager.addr), self._greet, self.manager.port)
        self.phase = "waiting for workers to come"
        self.renew(self.settings)

    def renew(self, settings: Settings) -> None:
        """From now on workers come with these settings."""
        self.settings = self.launch.settings = settings
        self._write_join()
        argv = self.manager.worker_command({**vars(settings), "join": self.join_file})
        self.command = shlex.join(argv)
        self.had_enough = False
        self._check()
        node.progress.call_later(settings.timeout, lambda: self._look(settings))

    def save_join(self, **changes: Any) -> None:
        """Write the join file: of this host's folders it says nothing."""
        super().save_join(**changes, dir="", elastic=True)

    def _check(self) -> None:
        self.had_enough |= len(self.pids) >= (self.settings.min_workers or 0)
        super()._check()

    def _look(self, asked: Settings) -> None:
        """The time in which the first workers were to come is over."""
        if asked is self.settings and not self.had_enough:
            come = f"{len(self.pids)} of {asked.min_workers} workers"
            self._fail(f"{come} have come within {asked.timeout:g} s")

    def _greet(self, sock: Any) -> None:
        try:
            hello = greeting.accept(sock, self._cookie, _GREETING)
            refused = self._refusal(hello)
            greeting.send_hello(sock, {"refused": refused} if refused else {})
            if refused:
                raise greeting.Refused(refused)
            sock.settimeout(self.settings.timeout)
            hello.update(greeting.receive_hello(sock))
        except (OSError, ValueError, KeyError) as exc:
            _log.log("info", f"a worker did not come in: {exc}")
            sock.close()
            return
        config = WorkerConfig(hello["host"], os_pid=hello["os_pid"], ident=hello.get("ident"))
        entry = self.arrivals.add(roster.reserve(1), config)
        entry.taken = True
        self._register(sock, hello, entry)

    def _refusal(self, hello: dict[str, Any]) -> str | None:
        if hello["world"] != self.number:
            return "its join file is of a door that has been closed; take the new one"
        ours = greeting.about()
        for what in ("python", "hpcdist"):
            if hello.get(what) != ours[what]:
                return f"it has {what} {hello.get(what)}, process 1 has {ours[what]}"
        return None

    def abandon(self) -> None:
        """Let nobody in any more; those who are there stay."""
        super().abandon()
        if not self.pids:
            self.close()

    def close(self) -> None:
        """End it: nobody comes any more, and all are gone."""
        super().close()
        janitor, self.janitor = self.janitor, None
        if janitor is not None:
            node.turns.background(lambda: _dismiss(janitor))


def _dismiss(janitor: subprocess.Popen[bytes]) -> None:
    janitor.communicate()


def _interface(addr: str | None) -> str | None:
    """Return an address of this host as `network.listen` wants it; a name is looked up."""
    if addr in (None, "", "0.0.0.0", "::"):
        return None
    for place in (addr, _look_up(str(addr))):
        try:
            network.addresses(place)
            return place
        except ValueError as exc:
            has = str(exc).partition(": ")[2]
    raise ValueError(f"addr={addr!r} is neither an address nor an interface here: {has}")


def _look_up(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return name
