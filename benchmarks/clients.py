"""Workers that are nothing but a link each, to see what a worker costs process 1.

`python -m benchmarks.clients JOIN COUNT` is COUNT of them in one process, without MPI. It says that
it is ready, comes in when told to, and ends with its standard input.
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.idle import rss_mb
from benchmarks.statistics import Pair

COUNT = 256
_AT_ONCE = 8
_PATIENCE = 120.0


def links(hpcdist: Any) -> dict[str, Pair]:
    """What each of many workers costs process 1: time to come in, memory, descriptors."""
    manager = hpcdist.ElasticManager(addr="127.0.0.1")
    launch = hpcdist.launch(manager)
    argv = [sys.executable, "-m", "benchmarks.clients", manager.join_file, str(COUNT)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        clients.stdout.readline()
        before = rss_mb(os.getpid()), descriptors()
        begin = perf_counter()
        clients.stdin.write(b"come\n")
        clients.stdin.flush()
        launch.wait(COUNT, timeout=_PATIENCE)
        taken = perf_counter() - begin
        after = rss_mb(os.getpid()), descriptors()
        clients.stdin.close()
    hpcdist.shutdown()
    return {
        "time": Pair(taken / COUNT * 1e3, 0.0),
        "memory": Pair((after[0] - before[0]) / COUNT * 1e3, 0.0),
        "files": Pair((after[1] - before[1]) / COUNT, 0.0),
    }


def descriptors() -> int:
    """Count the open descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def come(join: dict[str, Any]) -> Any:
    """Come in as a worker; return the link."""
    from hpcdist._wire import greeting
    from hpcdist._worker import dialling

    sock = dialling.dial(join)
    hello = {**greeting.about(), "kind": "worker", "world": join["world"], "rank": -1}
    greeting.dial(sock, bytes.fromhex(join["cookie"]), hello, _PATIENCE)
    answer = greeting.receive_hello(sock)
    assert "refused" not in answer, answer
    greeting.send_hello(sock, {"address": ""})
    return sock


def listen(sock: Any) -> None:
    """Take what process 1 tells, until it ends."""
    try:
        while sock.recv(1 << 16):
            pass
    except OSError:
        pass


def main(file: str, count: int) -> None:
    """Be that many workers."""
    import hpcdist._transport.tls  # noqa: F401  (not part of what is measured)

    join = json.loads(Path(file).read_text())
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        socks = list(pool.map(come, [join] * count))
    for sock in socks:
        threading.Thread(target=listen, args=(sock,), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
