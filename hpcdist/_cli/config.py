"""`hpcdist config`: each setting, its value, and who has said so."""

from __future__ import annotations

import argparse
import json

from hpcdist import _config
from hpcdist._cli.schedulers import leave
from hpcdist._schedulers.findings import table


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    try:
        found = _config.sayings()
    except ValueError as exc:
        leave(options, 1, str(exc))
    if options.json:
        facts = [{"name": name, "value": value, "from": source} for name, value, source in found]
        print(json.dumps(facts, indent=1, default=str))
        return 0
    rows = [(name, "-" if value is None else str(value), source) for name, value, source in found]
    print(table(("SETTING", "VALUE", "FROM"), rows))
    return 0
