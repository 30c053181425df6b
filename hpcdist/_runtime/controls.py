"""The numbers of the controls, in one place so that no two are the same."""

from __future__ import annotations

# 1 and 12: peers gather these themselves.
from hpcdist._transport.router import ACKNOWLEDGE as ACKNOWLEDGE
from hpcdist._transport.router import RELEASE as RELEASE

SENT = 2  # a reference was sent: (whence, id, to whom)
FETCH, READY, PUT, CANCEL, RUNNING = 3, 4, 5, 6, 7  # futures
INTERRUPT = 9
OPERATE, WITHDRAW, GIVE_BACK, FREE = 10, 11, 13, 14  # remote channels
PUT_ITEM, TAKE_ITEM = 15, 16  # the same in short, for the plain case: (whence, id) and the item
WELCOME = 20  # pid 1 to a new worker: who it is and whom it knows
JOINED = 21  # pid 1 to workers: [(pid, member), ...]
LEFT = 22  # pid 1 to workers: a pid is being removed
DIED = 23  # pid 1 to workers: (pid, why, host, stderr)
LEAVE = 24  # pid 1 to a worker: end
OUTPUT = 25  # a worker to pid 1: (descriptor, text)
STATUS = 26
PARK = 27  # pid 1 to a rank that leaves before its world can: run nothing more
TRUST = 28  # pid 1 to a worker: the certificate by which workers on other hosts are known
CALL_ME = 29  # a worker by way of pid 1 to another, which it cannot dial: (whom, who)
VIA = 33  # a message between workers that no link joins, by way of pid 1: whom it is for, or from
POOL = 30  # an operation on a worker pool: (pool, name, argument)
TAKE_BACK = 31  # items of batches that have not started: (all or half, ids of the batches)
FORGET = 32  # functions kept for `pmap` or a CachingPool: (tokens, ids of batches)

# Trees: work handed down and its outcomes handed up; pieces of a value; a part for one process;
# a value asked for, freed, let go of by its users; a shared segment that is no more.
DOWN, UP, CHUNK, STORE, PULL, DROP, DROPPED, UNMAP = 40, 41, 42, 43, 44, 45, 46, 47
# spmd, between a caller, pid 1 and the members of a section
SECTION_ENTER = 60  # caller to pid 1, a request: (pids, grace); answered once the set may enter
SECTION_HERE = 61  # member to pid 1: (number, the communicator it has kept)
SECTION_GO = 62  # pid 1 to a member: (number, communicator, whether to make it, culprit, worn)
SECTION_OVER = 63  # member, or the caller for it, to pid 1: (number, pid, how it failed or "")
SECTION_FREE = 64  # pid 1 to a member: leave MPI; a colleague has failed
SECTION_STUCK = 65  # member to pid 1: (number, whether it is still inside MPI)
SECTION_VERDICT = 66  # caller to pid 1, a request: who was killed in a section
SECTION_DIE = 67  # pid 1 to a member that no keeper can kill
