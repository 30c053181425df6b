"""`hpcdist run --machine-file` with other hosts in the file."""

import pytest

from tests.ssh.hosts import Hosts

pytestmark = pytest.mark.any_mpi


def test_a_machine_file_adds_workers_on_all_its_hosts(hosts: Hosts) -> None:
    machines = "# all of ours\nlocalhost\n2*n1  # by ssh\n\nauto*hpcuser@n2:2222\n0*n1:2222\n"
    hosts.file("machines", machines)
    hosts.file(
        "driver.py",
        "import os, socket, hpcdist as h\n"
        "here = h.everywhere.call(socket.gethostname, pids=h.workers())\n"
        "cores = len(os.sched_getaffinity(0))\n"
        "assert list(here.values()) == ['login', 'n1', 'n1'] + ['n2'] * cores, here\n"
        "print('all there')\n",
    )
    command = (hosts.python, "-m", "hpcdist", "run", "--machine-file", "machines")
    done = hosts.login(*command, "driver.py")
    assert (done.rc, done.out) == (0, "all there\n"), done

    hosts.file("machines", "n1\n3*no-entry\n")
    done = hosts.login(*command, "driver.py")
    assert done.rc == 1, done
    assert "hpcdist run: no-entry: " in done.err, done
    assert "Permission denied" in done.err, done
    assert "Traceback" not in done.err, done
