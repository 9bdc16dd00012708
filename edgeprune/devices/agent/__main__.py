"""Start of the program: as the agent, or as one of its workers."""

from __future__ import annotations

import os
import sys


def run() -> None:
    """Serve a client, or be a worker: ``worker PARENT CPUS``."""
    program = os.path.abspath(sys.path[0])
    if sys.argv[1:2] == ["worker"]:
        from .worker import main

        main(int(sys.argv[2]), [int(cpu) for cpu in sys.argv[3].split(",") if cpu])
    else:
        from .server import main as serve

        serve(program)
