"""Ctrl-C in a put whose owner is far away, in virtual time."""

from __future__ import annotations

import pytest

from hpcdist import RemoteChannel, channel_from_id, remoteref_id
from hpcdist.testing import Simulation


@pytest.mark.parametrize("presses", [(0.05,), (0.05, 0.1), (0.45, 0.1, 0.1), (0.7, 0.05)])
def test_more_presses_say_the_same_as_the_first(presses: tuple[float, ...]) -> None:
    """The owner's word takes 0.6 s: whether the item is there is known all the same."""
    with Simulation(nodes=3, seed=5) as sim:
        channel = sim.node(1).run(lambda: RemoteChannel(10, 3))
        sim.delay(0.3)

        def put() -> str:
            try:
                channel.put("item")
            except KeyboardInterrupt as exc:
                return "".join(["broken off", *getattr(exc, "__notes__", [])])
            return "put"

        task = sim.node(1).start(put)
        for pause in presses:
            sim.advance(pause)
            sim.press_ctrl_c(1)
        try:
            said = task.result()
        except KeyboardInterrupt:  # it came as the put was done
            said = "put"
        there = sim.node(3).run(lambda: len(channel_from_id(remoteref_id(channel))))
        assert (said, there) in [("put", 1), ("broken off", 0)]
