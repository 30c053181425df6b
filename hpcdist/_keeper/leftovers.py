"""What the ranks of a world would leave in /dev/shm.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import glob

from hpcdist._keeper.processes import segments_of, unlink


class Leftovers:
    """The shared memory of the ranks of one host, as far as it has names."""

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def note(self, pid: int) -> None:
        """Take down what a process has open: it cannot be found out after its end."""
        self._paths |= segments_of(pid)

    def unname(self) -> None:
        """Remove the names of what all ranks have opened, as they are through `MPI_Init`.

        So nothing stays where nobody comes to remove it. Open MPI's are opened late.
        """
        for path in [path for path in self._paths if "mpich" in path]:
            unlink(path)
            self._paths.discard(path)

    def remove(self, pattern: str) -> None:
        """Remove all that is left, and what is named so: ranks may have ended before a look."""
        for path in [*self._paths, *(glob.glob(f"/dev/shm/{pattern}") if pattern else ())]:
            unlink(path)
