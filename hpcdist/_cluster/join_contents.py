"""What a join file tells the workers of a world, and their keeper."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from hpcdist import _config
from hpcdist._contract.managers import Settings


def join_contents(
    settings: Settings, way: Mapping[str, Any], env: Mapping[str, str], cookie: bytes
) -> dict[str, Any]:
    """Return what there is to tell before it is known how the world is started.

    Args:
        way: How process 1 is reached.
        env: The variables that workers set.
        cookie: The cluster's secret.
    """
    return {
        **way,
        "cookie": cookie.hex(),
        "timeout": settings.timeout,
        "how": "",
        "mpi": False,
        "path": [os.path.abspath(p) if p else os.getcwd() for p in sys.path],
        "cwd": settings.dir,
        "env": env,
        "tables": _config.learned(),
    }
