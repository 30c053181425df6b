"""Workers that come and go by themselves: wherever `hpcdist worker --join FILE` is typed."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from typing import Any

from hpcdist import _config, _log
from hpcdist._cluster.begin import Launches
from hpcdist._cluster.listener import Listener
from hpcdist._cluster.roster import State
from hpcdist._cluster.world import World
from hpcdist._contract.kept_managers import KeptManager, LaunchView, Plan
from hpcdist._contract.managers import Settings, WorkerConfig
from hpcdist._contract.phases import Phase
from hpcdist._public import public
from hpcdist._transport import network
from hpcdist._transport.link import Link
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello, Socket

_GREETING = 10.0
# Run beside process 1: when that ends, in whatever way, the join file goes too.
_JANITOR = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], True)"


@public
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
    ends_when_interrupted = False  # its workers were not started by us

    def __init__(self, addr: str | None = None, port: int = 0) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
            raise ValueError(f"port is a number from 0 to 65535, not {port!r}")
        self.addr = addr
        self.port = port
        self._launch: LaunchView | None = None

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
    def open_launch(self) -> LaunchView | None:
        """The launch that lets workers in; None while the door is shut."""
        return self._launch if self._launch is not None and self._launch.pending else None

    def _last(self) -> LaunchView:
        if self._launch is None:
            started = Launches.here().begin(self, {})
            if started.error is not None:  # the door could not be opened
                raise started.error
            return started
        return self._launch

    def default_addprocs_params(self) -> dict[str, Any]:
        """Return what holds where nothing is said: while the door is open, what was said before."""
        defaults = super().default_addprocs_params()
        if self.open_launch is not None:
            last = vars(self.open_launch.settings)
            defaults |= {name: last[name] for name in defaults.keys() & last.keys()}
            wrapper = last["wrapper"]  # stands in the command as well
            defaults |= {"python": last["python"][len(wrapper) :], "wrapper": wrapper or None}
        return defaults | {"min_workers": None}

    def prepare(self, settings: Settings) -> Plan:
        """Refuse an address that is not this host's."""
        _interface(self.addr)
        return Plan(settings)

    def reuse(self, settings: Settings) -> LaunchView | None:
        """Let workers come with other settings from now on, if the door is open."""
        launch = self.open_launch
        if launch is not None:
            world = launch.worlds[0]
            assert isinstance(world, ElasticWorld)
            world.renew(settings)
        return launch

    def make_world(self, launch: LaunchView, size: int | None) -> World:
        """Make a world whose workers come by themselves."""
        return ElasticWorld(launch, size)

    def start(self, launch: LaunchView) -> None:
        """Take note of the launch: its door is open."""
        self._launch = launch

    def kill(self, pid: int, config: WorkerConfig) -> None:
        """End our side of the connection to a worker: then the worker's guard ends it."""
        assert self._launch is not None
        link = self._launch.node.peers[pid].link
        if isinstance(link, Link) and link.open:
            with socket.socket(fileno=os.dup(link.sock.fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)


class ElasticWorld(World):
    """All workers that come by one join file. Each is alone: there is no MPI between them."""

    had_enough = False
    janitor: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        """Those of its workers that are there."""
        return [p for p in self.registered if self._roster.book[p].state is not State.GONE]

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
        interface, port = _interface(self.manager.addr), self.manager.port
        self.door = Listener.on_network(self._node, interface, self._cookie, self._greet, port)
        self.reach(Phase.OPEN)
        self.renew(self.settings)

    def renew(self, settings: Settings) -> None:
        """Give these settings to workers that come from now on."""
        self.settings = self.launch.settings = settings
        self._write_join()
        argv = self.manager.worker_command({**vars(settings), "join": self.join_file})
        self.command = shlex.join(argv)
        self.had_enough = False
        self._check()
        self._node.progress.call_later(settings.timeout, lambda: self._look(settings))

    def save_join(self, **changes: object) -> None:
        """Write the join file: of this host's folders it says nothing."""
        super().save_join(**changes, dir="", elastic=True)

    def _check(self) -> None:
        self.had_enough |= len(self.pids) >= (self.settings.min_workers or 0)
        super()._check()

    def _look(self, asked: Settings) -> None:
        """Fail if the first workers have not come in time."""
        if asked is self.settings and not self.had_enough:
            come = f"{len(self.pids)} of {asked.min_workers} workers"
            self._fail(f"{come} have come within {asked.timeout:g} s")

    def _greet(self, sock: Socket, hello: Hello) -> None:
        try:
            refused = self._refusal(hello)
            greeting.send_hello(sock, {"refused": refused} if refused else {})
            if refused:
                raise greeting.Refused(refused)
            sock.settimeout(self.settings.timeout)
            hello.update(greeting.receive_hello(sock))
        except (OSError, ValueError, KeyError) as exc:
            _log.log("info", f"a worker could not join: {exc}")
            sock.close()
            return
        config = WorkerConfig(hello["host"], os_pid=hello["os_pid"], ident=hello.get("ident"))
        entry = self.arrivals.add(self._roster.reserve(1), config)
        entry.taken = True
        self._register(sock, hello, entry)

    def _refusal(self, hello: Hello) -> str | None:
        if hello["world"] != self.number:
            return "its join file is of a door that has been closed; take the new one"
        ours = greeting.about()
        for what in ("python", "hpcdist"):
            if hello.get(what) != ours[what]:
                return f"it has {what} {hello.get(what)}, process 1 has {ours[what]}"
        return None

    def abandon(self) -> None:
        """Let no more workers in; those that are there stay."""
        super().abandon()
        if not self.pids:
            self.close()

    def close(self) -> None:
        """End it: let no more workers in, and end those that are there."""
        super().close()
        janitor, self.janitor = self.janitor, None
        if janitor is not None:
            self._node.turns.background(lambda: _dismiss(janitor))


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
