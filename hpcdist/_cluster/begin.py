"""Launches are begun here, and all that this process has begun are known here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hpcdist import _config
from hpcdist._cluster.launch import Launch
from hpcdist._cluster.roster import Roster
from hpcdist._contract.kept_managers import KeptManager, Plan
from hpcdist._contract.managers import COMMON, ClusterManager, Settings
from hpcdist._runtime.node import Node, Service

_TOPOLOGIES = ("all_to_all", "master_worker", "custom")
_ISOLATIONS = ("auto", "world", "process")


class Launches(Service):
    """All launches that this process has begun."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.launches: list[Launch] = []
        self.one_at_a_time = node.machine.lock()  # held by an addprocs
        self.local: Callable[[int], ClusterManager] | None = None  # instead of LocalManager
        self._roster = node.service(Roster)

    def begin(self, manager: ClusterManager, params: dict[str, Any]) -> Launch:
        """Begin a launch with parameters of `addprocs`, or let one that is open go on with them."""
        plan = self.plan(manager, params)
        if isinstance(manager, KeptManager):
            open_one = manager.reuse(plan.settings)
            if isinstance(open_one, Launch):
                return open_one
        self._forget_what_is_over()
        started = Launch(self.node, manager, plan)
        self.launches.append(started)
        started.begin()
        return started

    def _forget_what_is_over(self) -> None:
        for past in [past for past in self.launches if past.over()]:
            self.launches.remove(past)
            for world in past.worlds:
                self._roster.forget(list(world.by_rank.values()))

    def plan(self, manager: ClusterManager, params: dict[str, Any]) -> Plan:
        """Plan a launch with parameters of `addprocs`.

        Raises:
            TypeError, ValueError: They are wrong.
        """
        own = manager.own_params
        known = COMMON | set(own or ())
        for name in params if own is not None else ():
            if name == "srun_args" and name not in known:
                raise TypeError(f"srun_args= is for jobs of Slurm: {manager!r} starts no srun")
            if name not in known:
                raise _config.unknown_option(name, sorted(known), "addprocs")
        settings = Settings.of(manager.default_addprocs_params(), params)
        kept = manager if isinstance(manager, KeptManager) else None
        self._check(settings, folder=kept is None or not (kept.hosts_apart or kept.elsewhere))
        _check_renewal(manager, settings)
        _check_adapting(manager, settings)
        return Plan(settings) if kept is None else kept.prepare(settings)

    def _check(self, settings: Settings, *, folder: bool) -> None:
        for name, value, choices in (
            ("topology", settings.topology, _TOPOLOGIES),
            ("isolation", settings.isolation, _ISOLATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")
        _check_concurrency(settings.concurrency)
        if folder and not os.path.isdir(settings.dir):
            raise ValueError(f"dir={settings.dir!r} is not a directory")
        node = self.node
        if node.members.living and settings.topology != node.topology:
            raise ValueError(
                f"workers with topology {node.topology!r} exist; {settings.topology!r} cannot be "
                "added to them"
            )
        node.topology = settings.topology


def _check_concurrency(limit: object) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"concurrency is a positive number or None, not {limit!r}")


def _check_renewal(manager: ClusterManager, settings: Settings) -> None:
    if not isinstance(settings.renew, bool):
        raise ValueError(f"renew is True or False, not {settings.renew!r}")
    kept = manager if isinstance(manager, KeptManager) else None
    if settings.renew and (kept is None or kept.inside or not kept.can_renew):
        raise ValueError(
            "renew=True is for workers that a manager of hpcdist starts, and can start again. It "
            f"is not for {manager!r}"
        )


def _check_adapting(manager: ClusterManager, settings: Settings) -> None:
    if settings.adapt is None:
        return
    if not (isinstance(manager, KeptManager) and manager.can_adapt):
        raise ValueError(
            "adapt=(lo, hi) is for workers in jobs of a batch scheduler, which are started and "
            f"given back as they are needed. It is not for {manager!r}"
        )
