"""Workers in jobs of HTCondor: `addprocs(BatchManager(HTCondor(), 8), request_memory="4GB")`.

A job of the vanilla universe has one host, and so has a world. HTCondor reads a file of its own
kind beside the script, and nothing in the script.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hpcdist.managers import (
    Asked,
    CommandFailed,
    CommandLate,
    CommandMissing,
    JobId,
    JobSpec,
    JobState,
    Scheduler,
    Settings,
    SubmitError,
    Verdict,
    run,
)

# JobStatus in the appendix "Job ClassAd Attributes" of the manual.
STATES = {
    1: ("IDLE", JobState.QUEUED),
    2: ("RUNNING", JobState.RUNNING),
    3: ("REMOVED", JobState.CANCELLED),
    4: ("COMPLETED", JobState.DONE),
    5: ("HELD", JobState.HELD),
    6: ("TRANSFERRING_OUTPUT", JobState.RUNNING),
    7: ("SUSPENDED", JobState.PAUSED),
}
ATTRIBUTES = "ClusterId,ProcId,JobStatus,HoldReason,RemoveReason,RemoteHost,ExitCode,ExitSignal,"
ATTRIBUTES += "JobCurrentStartDate"


def parse_ads(text: str, source: str) -> dict[JobId, Verdict]:
    """Read what `condor_q -json` and `condor_history -json` print."""
    ads = json.loads(text.strip() or "[]")
    return {JobId(f"{ad['ClusterId']}.{ad['ProcId']}"): _verdict(ad, source) for ad in ads}


def _verdict(ad: dict[str, Any], source: str) -> Verdict:
    word, state = STATES.get(ad.get("JobStatus", 0), ("UNKNOWN", JobState.UNKNOWN))
    code, signal = ad.get("ExitCode"), ad.get("ExitSignal")
    if state is JobState.DONE and (code or signal):
        word, state = "FAILED", JobState.FAILED
    began = ad.get("JobCurrentStartDate")
    return Verdict(
        start=datetime.fromtimestamp(began).astimezone() if began else None,
        state=state,
        word=word,
        reason=ad.get("HoldReason") or ad.get("RemoveReason") or "",
        nodes=ad.get("RemoteHost", ""),
        exit_code=code,
        signal=signal,
        source=source,
    )


class HTCondor(Scheduler):
    """HTCondor, as condor_submit(1), condor_q(1), condor_history(1) and condor_rm(1) have it."""

    name = "htcondor"
    program = "condor_submit"
    per_node_option = ""  # a world has one node
    dir_option = "initialdir"
    time_option = "allowed_job_duration"
    impossible = {
        "executable": ("template=", "the job is a script that is rendered from a template"),
        "universe": ("HTCondor", "workers run in the vanilla universe"),
    }
    a_minute = {"allowed_job_duration": "60"}
    scrubbed = ("_CONDOR_",)

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        return {
            "universe": "vanilla",
            "executable": f"{job.folder}/script.sh",
            "batch_name": job.name,
            "request_cpus": job.size,
            "initialdir": job.cwd,
            "log": f"{job.folder}/condor.log",
            "should_transfer_files": "NO",
        }

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        seconds = asked.number("allowed_job_duration")
        return None if seconds is None else float(seconds)

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Return none: they would be read by nobody."""
        return ()

    def description(self, job: JobSpec) -> str:
        """Return what condor_submit is to read."""
        lines = [
            f"{name} = {value}"
            for name, (_, value) in job.options.options.items()
            if value is not None and value is not False
        ]
        return "\n".join([*lines, *job.options.own.options, "queue", ""])

    def own_log(self, asked: Asked) -> bool:
        """Have the script write its output itself, so that it is there at once."""
        return asked.value("output") is None

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Write the description beside the script, and submit it."""
        path = Path(script).with_name("job.sub")
        path.write_text(self.description(job))
        done = run(["condor_submit", "-terse", os.fspath(path)], deadline=150, log=log)
        if done.status:
            raise SubmitError(done.said)
        ids = re.findall(r"^([0-9]+\.[0-9]+) - [0-9.]+$", done.out, re.MULTILINE)  # first - last
        if not ids:
            raise ValueError(f"condor_submit printed no job id: {done.out!r}")
        return JobId(ids[-1])

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job by its executable, which is no other's."""
        return next(iter(self._queue("-constraint", f'Cmd == "{script}"', log=log)), None)

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask condor_q, which knows jobs that have not ended."""
        return {job: said for job, said in self._queue(*jobs, log=log).items() if job in jobs}

    def _queue(self, *which: str, log: str | None) -> dict[JobId, Verdict]:
        done = run(["condor_q", *which, "-json", "-attributes", ATTRIBUTES], log=log)
        try:
            if not done.status:
                return parse_ads(done.out, "condor_q")
        except ValueError:
            pass
        raise CommandFailed(done)

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask condor_q, and of jobs that have left it condor_history."""
        try:
            found = self.poll(jobs, log)
            left = [job for job in jobs if job not in found]
            argv = ["condor_history", *left, "-json", "-attributes", ATTRIBUTES]
            done = run(argv, log=log) if left else None
        except (CommandFailed, CommandLate, CommandMissing):
            return {}
        try:
            ended = {} if done is None else parse_ads(done.out, "condor_history")
        except ValueError:  # it may be switched off
            ended = {}
        return found | {job: said for job, said in ended.items() if job in left}

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by condor_rm; jobs that have ended are no error."""
        done = run(["condor_rm", *jobs], log=log)
        if done.status and "not found" not in done.said:
            raise CommandFailed(done)
