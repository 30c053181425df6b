"""Modules that were reloaded in this process, after others had imported them.

`importlib.reload`, and IPython's autoreload by way of it, give a module a new spec. So a reload is
noticed when a function of the module, or one of the script that names it, is sent the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class Reloads:
    """Notices that modules were reloaded.

    Args:
        on_reload: Called with the module's name, each of them.
    """

    def __init__(self, on_reload: Sequence[Callable[[str], None]]) -> None:
        self._on_reload = on_reload
        self._specs: dict[str, Any] = {}  # of the modules that were looked at, by name

    def look(self, module: ModuleType) -> Any:
        """Notice whether a module was reloaded; return the spec it has now."""
        spec = getattr(module, "__spec__", None)
        if self._specs.setdefault(module.__name__, spec) is not spec:
            self._specs[module.__name__] = spec
            for fn in self._on_reload:
                fn(module.__name__)
        return spec
