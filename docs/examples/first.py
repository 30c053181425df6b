"""A first program. It runs by itself, under mpiexec, and with `hpcdist run`."""

import hpcdist
from hpcdist import RemoteChannel, fetch, myid, remotecall, remotecall_fetch, workers

hpcdist.init(3)  # by itself: three workers; under mpiexec: the other ranks are the workers
pids = workers()


def part_of_pi(first: int, step: int, strips: int) -> float:
    """Add up every `step`-th of the strips below 4 / (1 + x²)."""
    middles = ((i + 0.5) / strips for i in range(first, strips, step))
    return sum(4 / (1 + x * x) for x in middles) / strips


print(f"1. Pi, summed over the workers {pids}")
parts = [remotecall(part_of_pi, pid, k, len(pids), 300_000) for k, pid in enumerate(pids)]
print(f"   {sum(map(fetch, parts)):.10f}\n")


def produce(channel: RemoteChannel, count: int) -> None:
    """Put squares; this runs on one worker."""
    for k in range(count):
        channel.put((myid(), k * k))
    channel.close()


def consume(channel: RemoteChannel) -> str:
    """Take until the channel is closed; this runs on another one."""
    return ", ".join(f"{value} from {pid}" for pid, value in channel)


print(f"2. A channel from worker {pids[0]} to worker {pids[-1]}")
channel = RemoteChannel(2)  # holds two values; a third `put` waits
remotecall(produce, pids[0], channel, 5)
print(f"   {remotecall_fetch(consume, pids[-1], channel)}\n")


def divide(a: float, b: float) -> float:
    """Fail where b is 0."""
    print(f"dividing {a} by {b}")
    return a / b


print(f"3. An error on worker {pids[-1]}, caught as if it had happened here")
try:
    remotecall_fetch(divide, pids[-1], 1, 0)
except ZeroDivisionError as error:
    print(error)
