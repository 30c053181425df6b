"""A login host by which jobs are submitted from elsewhere: `SlurmManager(128, via="login.site")`.

One ssh leads there, see `gate_link`. Through it go the scheduler's commands, each as an ssh that
shares the connection, and links: jobs dial the gate at its other end. The run's folder that jobs
see lies over there; the one here has what its world needs: the join file, and what jobs left.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hpcdist import _log
from hpcdist._contract.kept_managers import WorldView
from hpcdist._contract.managers import Settings
from hpcdist._keeper.installed_mpi import Mpi, MpiNotFound
from hpcdist._managers.ssh_link import own_path
from hpcdist._runtime.node import Node
from hpcdist._schedulers import commands, job
from hpcdist._schedulers.gate_link import GateLink
from hpcdist._schedulers.plan import BatchPlan, There, Via
from hpcdist._schedulers.submit_host import SubmitHost
from hpcdist._transport import doors
from hpcdist._transport.network import Address
from hpcdist._wire.greeting import Hello

_EXIT = "exit"  # the file that a job's script leaves
_REMOVING = 10.0


def host_of(node: Node, plan: BatchPlan) -> SubmitHost:
    """Return the host on which the jobs of a launch are submitted."""
    return SubmitHost() if plan.via is None else LoginHost(node, plan, plan.via)


class LoginHost(SubmitHost):
    """Another host, for one launch.

    Args:
        node: Whose launch it is.
        plan: What that is to be.
        via: Where the host is.
    """

    takes_over = False

    def __init__(self, node: Node, plan: BatchPlan, via: Via) -> None:
        self.name = str(via.machine)
        self.user = via.machine.user or ""
        self._node = node
        self._plan = plan
        self._via = via
        self._lock = threading.Lock()  # held while it is being reached
        self._counting = threading.Lock()  # guards the four below
        self._busy = 0  # how many use the link
        self._link: GateLink | None = None
        self._folders: dict[str, str] = {}  # of runs here, by those over there
        self._ports: dict[str, int] = {}  # which lead to the doors of worlds, by their folders

    # Reaching it

    @contextmanager
    def commands(self) -> Iterator[None]:
        """Have the commands that this thread runs meanwhile run on that host."""
        with self._used(), commands.on(self):
            yield

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Keep the link; whoever leaves it last, with no run over there, ends it."""
        with self._counting:
            self._busy += 1
        try:
            yield
        finally:
            with self._counting:
                self._busy -= 1
                unused = not (self._busy or self._folders)
                link = self._link if unused else None
                self._link = None if unused else self._link
            if link is not None:
                link.close()

    def reaching(self, argv: Sequence[str]) -> list[str]:
        """Return the command of this host that runs another one there."""
        return self._made().reaching(argv)

    def _made(self) -> GateLink:
        with self._counting:
            if self._link is None:
                self._link = GateLink(self._node, self._via, self._plan.settings, self._take_file)
            return self._link

    def reach(self, plan: BatchPlan) -> BatchPlan:
        """Connect, if that is still to be done; return the plan with what is there."""
        with self._lock:
            link = self._made()
            if not link.alive:
                self._plan = self._known(link, link.begin())
        return self._plan

    def cut(self) -> None:
        """Give up reaching it: nobody waits any more."""
        with self._counting:
            link = self._link
        if link is not None:
            link.cut()

    def _known(self, link: GateLink, hello: Hello) -> BatchPlan:
        self.user = hello["user"]
        settings = _there(self._plan.settings, hello["executable"])
        found = link.ask("find", python=settings.python, dir=settings.dir)
        if not found["is_dir"]:
            if settings.dir != os.getcwd():
                raise link.error(f"there is no directory {settings.dir!r}", "dir= names one there")
            settings = replace(settings, dir=hello["home"])
        there = There(
            self.name, hello["jobs"], hello["package"], _mpi(found), found.get("no_mpi", "")
        )
        return replace(self._plan, settings=settings, there=there)

    # Files and links

    def folder(self, world: WorldView) -> str:
        """Return where the folder of a world lies on that host."""
        return self._plan.folder(os.path.basename(world.folder))

    def welcome(self, world: WorldView) -> dict[str, Any]:
        """Let the members of a world dial that host, and so this one."""
        door = world.door
        if door is None:
            raise RuntimeError("the launch has ended meanwhile")
        link = self._made()
        port = link.forward(door.told["addresses"][0])
        self._ports[world.folder] = port
        targets = link.ask("open", port=port, interface=self._plan.asked.own.interface)
        package = self._plan.there.package if self._plan.there is not None else None
        path = dict.fromkeys([*own_path(world.join["path"]), *filter(None, [package])])
        return {"addresses": targets, "path": list(path), "cwd": self._plan.settings.dir}

    def bring(self, worlds: Sequence[WorldView], text: str) -> str:
        """Write what the job of worlds needs into their folders over there."""
        link = self._made()
        for world in worlds:
            folder = self.folder(world)
            with self._counting:
                self._folders[folder] = world.folder
            link.ask("make", folder=folder)
            with open(world.join_file) as file:
                link.ask("write", path=f"{folder}/join", text=file.read(), mode=0o600)
        folders = [self.folder(world) for world in worlds]
        if len(worlds) > 1:
            link.ask("number", folder=folders[0], folders=folders)
        script = f"{folders[0]}/script.sh"
        link.ask("write", path=script, text=text, mode=0o700)
        return script

    def tell(self, world: WorldView, facts: dict[str, Any]) -> None:
        """Write down, for `hpcdist jobs` over there, what the run is."""
        folder = self.folder(world)
        text = job.manifest(folder, facts)
        self._made().ask("write", path=f"{folder}/{job.MANIFEST}", text=text, mode=0o600)

    def call(self, world: WorldView, targets: Sequence[Address]) -> None:
        """Have that host dial one that cannot dial it, and join it with process 1."""
        self._made().ask("call", targets=targets, port=self._ports[world.folder])

    def tail(self, path: str, n: int) -> list[str]:
        """Return the last lines of a file there."""
        with self._used(), contextlib.suppress(OSError):
            lines: list[str] = self._made().ask("tail", path=path, n=n)
            return lines
        return []

    def forget(self, folders: Sequence[str]) -> None:
        """Remove the folders over there of worlds that are being removed here."""
        with self.commands():
            for far in [far for far, here in list(self._folders.items()) if here in folders]:
                try:
                    self._remove(far)
                except (OSError, RuntimeError) as exc:
                    _log.log("warning", f"{far} on {self.name} could not be removed: {exc}")
                with self._counting:
                    del self._folders[far]
                    self._ports.pop(far, None)

    def _remove(self, folder: str) -> None:
        link = self._made()
        if link.alive:
            link.ask("forget", folder=folder)
        else:
            commands.run(["rm", "-rf", "--", folder], deadline=_REMOVING)

    def _take_file(self, folder: str, name: str, text: str) -> None:
        """Note what a job has left for process 1: how its script ended, or a door."""
        here = self._folders.get(folder)
        where, _, plain = name.rpartition("/")
        if here is None or plain in ("", ".", "..") or (name != _EXIT and where != doors.FOLDER):
            return
        path = os.path.join(here, name)
        with contextlib.suppress(OSError):  # the folder has gone with its world
            if where:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(path + ".new", "w") as file:
                file.write(text)
            os.replace(path + ".new", path)


def _there(settings: Settings, executable: str) -> Settings:
    """Name the interpreter by the path that it has over there, where it is no command's."""
    python = settings.python
    plain = len(python) - len(settings.wrapper) == 1
    return replace(settings, python=(*python[:-1], executable)) if plain else settings


def _mpi(found: dict[str, Any]) -> Mpi | None:
    if "mpi" not in found:
        return None
    family, version, mpiexec, is_wheel, lacks = found["mpi"]
    why = None
    if lacks is not None:
        why = MpiNotFound(lacks, "")
        why.args = (lacks,)  # it is complete
    return Mpi(family, tuple(version), mpiexec, inside=is_wheel, lacks=why)
