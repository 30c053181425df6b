"""What is remembered of the jobs of a launch."""

from __future__ import annotations

import datetime
from typing import NamedTuple

from hpcdist._cluster.world import World


class JobRecord(NamedTuple):
    """One job of a launch, as `Launch.history` lists it."""

    id: str
    state: str  # in the scheduler's words
    reason: str  # why it waits, or why it ended
    start: datetime.datetime | None
    end: datetime.datetime | None  # when it ended, or is to end at the latest
    workers: int  # how many have registered
    submitted: float  # on the clock of process 1


def job_record(world: World) -> JobRecord:
    """Return what is known of the job of a world."""
    said = world.verdict
    start, end = (None, None) if said is None else (said.start, said.end)
    if world.end is not None and not (said is not None and said.state.terminal):
        end = datetime.datetime.fromtimestamp(world.end.at).astimezone()
    if said is not None and said.state.terminal:
        state = world.word
    elif world.closed:
        state = "ENDED" if world.up else "CANCELLED"  # it was taken out of the queue
    else:
        state = "RUNNING" if world.up else world.word
    reason = "" if said is None else said.reason
    return JobRecord(
        world.job, state, reason, start, end, len(world.registered), world.submitted_at
    )
