"""What every process of a cluster does for others: the services that it has from the start."""

from __future__ import annotations

from hpcdist._collective.broadcast import Broadcasts
from hpcdist._collective.loops import Loops
from hpcdist._collective.reductions import Reductions
from hpcdist._collective.remote_values import RemoteValues
from hpcdist._collective.tree_calls import TreeCalls
from hpcdist._collective.trees import Trees
from hpcdist._collective.value_copies import ValueCopies
from hpcdist._events.records import Recorder
from hpcdist._events.samples import Sampler
from hpcdist._maps.map_worker import Batches
from hpcdist._monitor.output import WorkersOutput
from hpcdist._monitor.records import LoggedRecords
from hpcdist._monitor.stacks import Stacks
from hpcdist._remote.answers import Answers
from hpcdist._remote.call_interrupts import CallInterrupts
from hpcdist._remote.calls import Calls
from hpcdist._remote.cells import Cells
from hpcdist._remote.channel_owners import OwnedChannels
from hpcdist._remote.no_room import NoRoom
from hpcdist._remote.object_owners import Objects
from hpcdist._runtime.node import Service
from hpcdist._runtime.references import References
from hpcdist._worker.dialling import Links
from hpcdist._worker.life import Life
from hpcdist._worker.relay import Relay

EVERY_PROCESS: tuple[type[Service], ...] = (
    References,
    Cells,
    Answers,
    Calls,
    CallInterrupts,
    OwnedChannels,
    NoRoom,
    Objects,
    Trees,
    TreeCalls,
    Reductions,
    Loops,
    ValueCopies,
    Broadcasts,
    RemoteValues,
    Batches,
    WorkersOutput,
    Stacks,
    Sampler,
    LoggedRecords,
    Recorder,
    Relay,
    Links,
    Life,
)
