"""The driver: a process that runs the user's program, and may add workers."""

from __future__ import annotations

import atexit

from hpcdist._cluster.begin import Launches
from hpcdist._cluster.onlookers import Onlookers
from hpcdist._cluster.roster import Roster
from hpcdist._cluster.sections import Sections
from hpcdist._cluster.tracing import Traces
from hpcdist._managers.lifecycle import end
from hpcdist._managers.mpi_launch import MpiLaunch
from hpcdist._runtime.node import Node, Service
from hpcdist._worker.services import EVERY_PROCESS

DRIVER: tuple[type[Service], ...] = (
    *EVERY_PROCESS,
    Roster,
    Sections,
    Launches,
    MpiLaunch,
    Onlookers,
    Traces,
)


def begin(node: Node) -> None:
    """Make a process a driver; all but workers are, from the first use of a public name."""
    if node.has_begun:
        return
    node.serve(DRIVER)
    node.service(MpiLaunch).refuse_others()
    atexit.register(end, node)
