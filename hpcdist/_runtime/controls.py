"""The numbers of the controls, in one place so that no two are the same."""

from __future__ import annotations

RELEASE = 1  # references counted down: triples (whence, id, n)
SENT = 2  # a reference was sent: (whence, id, to whom)
FETCH, READY, PUT, CANCEL, RUNNING = 3, 4, 5, 6, 7  # futures
INTERRUPT = 9
OPERATE, WITHDRAW, ACKNOWLEDGE, GIVE_BACK, FREE = 10, 11, 12, 13, 14  # remote channels
WELCOME = 20  # pid 1 to a new worker: who it is and whom it knows
JOINED = 21  # pid 1 to workers: [(pid, member), ...]
LEFT = 22  # pid 1 to workers: a pid is being removed
DIED = 23  # pid 1 to workers: (pid, why, host, stderr)
LEAVE = 24  # pid 1 to a worker: end
OUTPUT = 25  # a worker to pid 1: (descriptor, text)
STATUS = 26
