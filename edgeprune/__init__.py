"""edgeprune: a trained PyTorch model, your data and a millisecond budget in; a verified bundle out.

``import edgeprune`` is quick: torch is imported when a function that needs it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from edgeprune.records.version import VERSION

__version__ = VERSION
__all__ = ["deploy", "load", "load_pruned", "verify"]

# Threads that spin while they wait for each other take the processors from whatever else runs here, and then wait all the longer. Read by
# OpenMP when torch is first loaded; whoever set it otherwise keeps what they set.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from edgeprune.bundle.load import load
    from edgeprune.bundle.verify import verify
    from edgeprune.compress.pruned_file import load_pruned
    from edgeprune.pipeline.api import deploy

_HOMES = {
    "deploy": "edgeprune.pipeline.api",
    "load": "edgeprune.bundle.load",
    "load_pruned": "edgeprune.compress.pruned_file",
    "verify": "edgeprune.bundle.verify",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
