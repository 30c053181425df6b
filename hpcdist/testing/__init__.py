"""A cluster in one process, for tests: simulated time, simulated network, real nodes.

See the page "Testing" of the documentation.
"""

from __future__ import annotations

from hpcdist.testing.baton import SimulationError
from hpcdist.testing.network import Traffic
from hpcdist.testing.records import Record, Trace
from hpcdist.testing.simulation import Deadlock, SimNode, Simulation, Task, compute

__all__ = [
    "Deadlock",
    "Record",
    "SimNode",
    "Simulation",
    "SimulationError",
    "Task",
    "Trace",
    "Traffic",
    "compute",
]

for _name in __all__:  # they call themselves by where users find them
    globals()[_name].__module__ = __name__
