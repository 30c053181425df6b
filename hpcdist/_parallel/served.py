"""What every process does for others: to import this is to be ready for it."""

from __future__ import annotations

from hpcdist._parallel import calling, loops, reductions, values

__all__ = ["calling", "loops", "reductions", "values"]
