"""The host on which a launch's jobs are submitted; this one, unless `via=` names another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hpcdist._contract.kept_managers import WorldView
from hpcdist._keeper.folders import last_lines
from hpcdist._schedulers import job
from hpcdist._schedulers.job import write_script
from hpcdist._schedulers.plan import BatchPlan
from hpcdist._transport.network import Address


class SubmitHost:
    """This host, for one launch: the scheduler's commands are here, and the runs' folders."""

    takes_over = True  # jobs that linger are looked for

    def commands(self) -> AbstractContextManager[None]:
        """Have the commands that this thread runs meanwhile run on that host."""
        return nullcontext()

    def reach(self, plan: BatchPlan) -> BatchPlan:
        """Make sure that it can be reached; return the plan with what is known of it.

        Raises:
            LaunchError: It cannot be, or it cannot start such workers.
        """
        return plan

    def cut(self) -> None:
        """Give up reaching it: nobody waits any more."""

    def folder(self, world: WorldView) -> str:
        """Return where the folder of a world lies on that host."""
        return world.folder

    def welcome(self, world: WorldView) -> dict[str, Any]:
        """Let the members of a world dial in; return what their join file says of the way."""
        return {}

    def bring(self, worlds: Sequence[WorldView], text: str) -> str:
        """Write what the job of worlds needs into their folders; return the script's path.

        Args:
            text: Of the script, which the tasks of a job array share.
        """
        folder = worlds[0].folder
        if len(worlds) > 1:
            _number_tasks(folder, [world.folder for world in worlds])
        return write_script(folder, text)

    def tell(self, world: WorldView, facts: dict[str, Any]) -> None:
        """Write down, for `hpcdist jobs`, what the run is."""
        job.write_manifest(world.folder, facts)

    def call(self, world: WorldView, targets: Sequence[Address]) -> None:
        """Dial one that has opened a door.

        Raises:
            OSError: It cannot be reached.
        """
        if world.door is not None:
            world.door.call(targets)

    def tail(self, path: str, n: int) -> list[str]:
        """Return the last lines of a file there."""
        return last_lines(path, n)

    def forget(self, folders: Sequence[str]) -> None:
        """Remove what lies there beside the folders of worlds that are being removed."""


def _number_tasks(folder: str, folders: Sequence[str]) -> None:
    """Let a job array find its tasks' folders by their numbers."""
    os.mkdir(os.path.join(folder, "tasks"), 0o700)
    for number, target in enumerate(folders):
        os.symlink(os.path.abspath(target), os.path.join(folder, "tasks", str(number)))
