"""`stacks()`: where the threads of processes are just now."""

from __future__ import annotations

import signal
from contextlib import suppress

from hpcdist._cluster.roster import Roster
from hpcdist._frames import brief
from hpcdist._monitor.output import WorkersOutput
from hpcdist._monitor.stacks import Stacks
from hpcdist._public import public
from hpcdist._runtime.node import Node, here
from hpcdist._transport.contracts import Slot
from hpcdist._wire.messages import AskStacks

_ANSWER = 1.0  # seconds until a process counts as one that runs no Python code
_PRINT = 3.0  # seconds that such a one has to print its stacks
_LOOK_EVERY = 0.05
_SILENT = "(it does not answer: it may be stopped, or hold the interpreter in C)"


@public
@brief
def stacks(*pids: int) -> dict[int, str]:
    """Return the Python stacks of processes as they are now, also of busy ones.

    Of a worker that runs no Python code, as it computes in C and holds the interpreter, the stacks
    come by a signal, without the source lines.

    Args:
        pids: Which; by default all workers.

    Raises:
        ProcessExitedException, ValueError: There is no such process.

    Example:
        >>> import hpcdist
        >>> "doctest" in hpcdist.stacks(1)[1]
        True
    """
    node = here.node
    node.admit()
    node.start()
    meant = list(dict.fromkeys(pids)) or sorted(node.members.living)
    asked = {pid: node.request(pid, AskStacks()) for pid in meant if pid != node.me}
    found = {pid: node.service(Stacks).text() for pid in meant if pid == node.me}
    deadline = node.machine.now() + _ANSWER
    for pid, slot in asked.items():
        with suppress(TimeoutError):
            node.wait(slot, max(0.0, deadline - node.machine.now()))
        if not slot.ready:
            found[pid] = _by_signal(node, pid)
        elif slot.error is None:
            found[pid] = bytes(slot.value[1]).decode()
    return {pid: found[pid] for pid in meant if pid in found}


def _by_signal(node: Node, pid: int) -> str:
    """Have a worker print its stacks by a signal, which it handles in C."""
    record = node.service(Roster).book.get(pid)
    world = record.world if record is not None else None
    with node.service(WorkersOutput).diverted_stacks(pid) as lines:
        if world is None or not world.signal(pid, signal.SIGUSR1):
            return _SILENT
        deadline, before = node.machine.now() + _PRINT, -1
        while node.machine.now() < deadline and not (lines and len(lines) == before):
            before = len(lines)
            with suppress(TimeoutError):
                node.wait(Slot(), _LOOK_EVERY)
        return "\n".join(lines) or _SILENT
