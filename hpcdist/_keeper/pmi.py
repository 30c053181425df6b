"""The server's half of PMI-1, the text protocol by which MPICH's family starts a world.

`PmiServer` holds no descriptor: it is fed what a rank wrote and returns what to answer to whom.
The commands are those MPICH 5.0.2 sends (version 1.1), one line each, `cmd=<name> key=value ...`;
requests of several lines are `mcmd=... endcmd`.

Only what a world needs for `MPI_Init` and `MPI_Finalize` is served. Spawning, ports and published
names are refused with an error: worlds are joined by links, never by MPI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpcdist._numbers import signed, whole

Reply = tuple[int, bytes]

# A rank that writes this much without a newline does not speak PMI-1: its bytes are dropped.
LONGEST_LINE = 64 * 1024

# Answers that never change: command -> line.
_FIXED = {
    "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
    "get_maxes": "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=4096",
    "get_appnum": "cmd=appnum rc=0 appnum=0",
    "finalize": "cmd=finalize_ack rc=0",
    "publish_name": "cmd=publish_result rc=1 msg=not_supported",
    "unpublish_name": "cmd=unpublish_result rc=1 msg=not_supported",
    "lookup_name": "cmd=lookup_result rc=1 msg=not_supported",
    "spawn": "cmd=spawn_result rc=1 errmsg=not_supported",
}


class PmiServer:
    """Serve one world of `size` ranks, or those of them that are on one of its hosts.

    With several hosts each has a server. What its ranks publish, `news` tells once all of them wait
    at a barrier; they go on when `meet` has brought what was published on the others.

    Args:
        size: How many ranks take part.
        name: The key-value space's name. Unique for each launch: MPICH derives the names of its
            shared segments from it.
        hosts: How many ranks each host has, in the order of the ranks.
        host: Which of them this one is.

    Attributes:
        ranks: Those of this host.
        joined: True once the world is known to be up; see `complete`.
        aborts: The exit codes of ranks that called `MPI_Abort`.

    >>> server = PmiServer(1, "kvs_1")
    >>> server.feed(0, b"cmd=get_universe_size\\n")
    [(0, b'cmd=universe_size rc=0 size=1\\n')]
    """

    def __init__(self, size: int, name: str, hosts: Sequence[int] = (), host: int = 0) -> None:
        hosts = hosts or [size]
        first = sum(hosts[:host])
        self.ranks = range(first, first + hosts[host])
        self.size = size
        self.name = name
        self.joined = False
        self.aborts: dict[int, int] = {}
        # The mapping says "from node k on, one node with so many": without it every rank would
        # take itself for alone on its host and MPI would go over the network.
        blocks = ",".join(f"({node},1,{count})" for node, count in enumerate(hosts))
        self._values = {"PMI_process_mapping": f"(vector,{blocks})"}
        self._alone = len(hosts) == 1
        self._fresh: dict[str, str] = {}  # published, and not told to the other hosts
        self._told = False  # all of this host wait, and the others know
        self._partial = [b""] * size
        self._spawning = [False] * size
        self._waiting: set[int] = set()
        self._gone: set[int] = set()

    def feed(self, rank: int, data: bytes) -> list[Reply]:
        """Take in what `rank` wrote; return the answers, each with the rank it is for."""
        *lines, rest = (self._partial[rank] + data).split(b"\n")
        if len(rest) > LONGEST_LINE:
            rest = b""
        self._partial[rank] = rest
        replies: list[Reply] = []
        for line in lines:
            replies += self._answer(rank, line.decode("utf-8", "replace").strip())
        return replies

    def leave(self, rank: int) -> list[Reply]:
        """Note that `rank` has ended; return what this releases."""
        self._gone.add(rank)
        self._waiting.discard(rank)
        return self._barrier()

    def complete(self) -> list[Reply]:
        """Note that all ranks are through `MPI_Init`; return what this releases.

        The protocol does not tell: MPICH 5 meets in shared memory, its one barrier is Finalize's.
        """
        self.joined = True
        return self._barrier()

    def _answer(self, rank: int, line: str) -> list[Reply]:
        if self._spawning[rank] or line.startswith("mcmd="):
            self._spawning[rank] = line != "endcmd"
            return [] if self._spawning[rank] else [(rank, _line(_FIXED["spawn"]))]
        words = parse(line)
        command = words.get("cmd", "")
        if command == "barrier_in":
            self._waiting.add(rank)
            return self._barrier()
        if command == "abort":
            code = signed(words.get("exitcode"))
            self.aborts[rank] = 1 if code is None else code
            return []
        return [(rank, _line(self._reply(command, words)))] if command else []

    def _reply(self, command: str, words: dict[str, str]) -> str:
        if command in _FIXED:
            return _FIXED[command]
        if command == "get_my_kvsname":
            return f"cmd=my_kvsname rc=0 kvsname={self.name}"
        if command == "get_universe_size":
            return f"cmd=universe_size rc=0 size={self.size}"
        if command == "put":
            self._values[words.get("key", "")] = words.get("value", "")
            self._fresh[words.get("key", "")] = words.get("value", "")
            return "cmd=put_result rc=0 msg=success"
        if command == "get":
            value = self._values.get(words.get("key", ""))
            if value is None:
                return "cmd=get_result rc=-1 msg=key_not_found value=unknown"
            return f"cmd=get_result rc=0 msg=success value={value}"
        if command == "getbyidx":
            return self._by_index(words.get("idx", ""))
        return f"cmd={command}_result rc=-1 msg=not_supported"

    def _by_index(self, text: str) -> str:
        index = whole(text) or 0
        keys = list(self._values)
        if index >= len(keys):
            return "cmd=getbyidx_results rc=-1 reason=no_more_keyvals"
        key = keys[index]
        return f"cmd=getbyidx_results rc=0 nextidx={index + 1} key={key} val={self._values[key]}"

    def _barrier(self) -> list[Reply]:
        """Release the barrier once all ranks wait at it.

        Inside `MPI_Init` a rank that died has not published what the others are about to read:
        they stay, and the keeper ends them. Once the world is up a barrier only counts heads
        (Finalize), and the dead must not hold up the living.
        """
        return self._release() if self._alone and self._are_all_here() else []

    def _are_all_here(self) -> bool:
        present = self._waiting | (self._gone if self.joined else set())
        return bool(self._waiting) and len(present) == len(self.ranks)

    def _release(self) -> list[Reply]:
        released, self._waiting = sorted(self._waiting), set()
        return [(rank, b"cmd=barrier_out rc=0\n") for rank in released]

    # Several hosts

    def news(self) -> dict[str, str] | None:
        """Tell, once at each barrier, what was published here; None: not all have come to it."""
        if self._alone or self._told or not self._are_all_here():
            return None
        news, self._fresh, self._told = self._fresh, {}, True
        return news

    def meet(self, values: Mapping[str, str]) -> list[Reply]:
        """Take in what was published on all hosts; return what this releases."""
        self._values.update(values)
        self._told = False
        return self._release()

    @property
    def segments(self) -> str:
        """A pattern for the names of the segments in /dev/shm that MPICH makes for this world.

        The name holds the FNV-1a hash of the key-value space's name and stays until Finalize
        (seen with MPICH 5.0.2).
        """
        digest = 2166136261
        for byte in self.name.encode():
            digest = (digest ^ byte) * 16777619 & 0xFFFFFFFF
        return f"mpich_shm_{digest:x}_*"


def parse(line: str) -> dict[str, str]:
    """Split a PMI-1 line into its words.

    `value` takes the rest of its line, as it comes last and may hold spaces.

    >>> parse("cmd=put kvsname=k key=a value=b c=d")
    {'cmd': 'put', 'kvsname': 'k', 'key': 'a', 'value': 'b c=d'}
    """
    head, mark, value = line.partition(" value=")
    words = dict(word.split("=", 1) for word in head.split() if "=" in word)
    if mark:
        words["value"] = value
    return words


def _line(text: str) -> bytes:
    return text.encode() + b"\n"
