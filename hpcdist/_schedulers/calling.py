"""Calls those who have opened a door, as they cannot dial process 1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hpcdist import _log
from hpcdist._contract.kept_managers import LaunchView, WorldView
from hpcdist._schedulers.submit_host import SubmitHost
from hpcdist._transport.doors import doors
from hpcdist._transport.network import Address


class Caller:
    """Of one launch.

    Args:
        launch: Whose jobs may have opened doors.
        host: Where they were submitted.
    """

    def __init__(self, launch: LaunchView, host: SubmitHost) -> None:
        self._launch = launch
        self._host = host
        self._called: set[str] = set()
        self._told = False

    def go_round(self) -> None:
        """Call those at the doors of its jobs; each once, and each on a thread of its own."""
        for world in self._launch.worlds:
            if world.job is None or world.closed or not (self._launch.pending or world.renews):
                continue
            for path, targets in doors(world.folder).items():
                if path not in self._called:
                    self._called.add(path)
                    self._launch.background(partial(self._call, world, path, targets))

    def _call(self, world: WorldView, path: str, targets: Sequence[Address]) -> None:
        where = ", ".join(dict.fromkeys(host for host, _ in targets))
        if not self._told:
            self._told = True
            _log.log("info", f"job {world.job} cannot dial process 1, which dials {where}")
        try:
            self._host.call(world, targets)
        except OSError as exc:
            if path in doors(world.folder):  # else it has got through itself, or has ended
                text = f"job {world.job} cannot dial process 1, nor is it reached: {exc}"
                _log.log("warning", text)
