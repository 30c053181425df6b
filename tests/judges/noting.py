"""Runs tests of unittest, and writes down how each of them went."""

from __future__ import annotations

import json
import unittest
from typing import Any


class _Noted(unittest.TextTestResult):
    """Notes how each test went."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.notes: dict[str, str] = {}

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.notes[test.id()] = "passed"

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self.notes[test.id()] = "failed"

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self.notes[test.id()] = "failed"

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self.notes[test.id()] = "skipped"


def run(tests: unittest.TestSuite, results: str) -> None:
    """Run the tests, and write into a file how they went."""
    runner = unittest.TextTestRunner(resultclass=_Noted, verbosity=2)
    found: Any = runner.run(tests)
    with open(results, "w") as file:
        json.dump(found.notes, file)
