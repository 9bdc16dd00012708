"""What the modules of the agent share."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be served; ``kind`` tells the host what sort of failure it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
