"""What every module of the agent may answer a request with when it cannot serve it."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be served; ``kind`` tells the host what sort of failure it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
