"""Boards that end, hang or lie: a "Python" that speaks the agent's wire and says what a test wants it to say."""

from __future__ import annotations

import sys
from pathlib import Path

from sshd import script

from edgeprune.records.device import Device

HELLO = {
    "machine": "aarch64",
    "cpu_model": "Raspberry Pi 4 Model B Rev 1.4",
    "cpu_flags": ["asimd", "crc32", "fp"],
    "cores": 4,
    "memory_bytes": 4 * 1024**3,
    "page_size_bytes": 4096,
    "kernel": "6.1.0",
    "python": "3.11.2",
    "governor": "ondemand",
    "hostname_digest": "0123456789ab",
    "emulated": False,
    "bits": 64,
    "glibc": "2.36",
    "boot_id": "0a0a0a0a-0000-4000-8000-000000000000",
    "wall_clock_ns": 1_800_000_000_000_000_000,
    "user": "pi",
    "affinity": None,
}

PROGRAM = """#!{python}
import json, struct, sys, time
out, source = sys.stdout.buffer, sys.stdin.buffer
USUAL = {{
    "hello": {hello!r},
    "lease": {{"lease_file": "/run/lock/edgeprune.lock"}},
    "bye": {{}}, "release": {{}}, "unload": {{}},
    "cache_state": {{"have": True, "offset": 0, "prefix_sha256": ""}},
}}
{prelude}
out.write(b"\\0edgeprune-agent/2\\n"); out.flush()
while True:
    size = source.read(4)
    if not size:
        break
    request = json.loads(source.read(struct.unpack(">I", size)[0]))
    source.read(struct.unpack(">Q", source.read(8))[0])
    if request["op"] == "beat":
        continue
    head = {{"id": request["id"], "ok": True}}
    if request["op"] in USUAL:
        header, blob = dict(head, **USUAL[request["op"]]), b""
    else:
        header, blob = {reply}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    out.write(struct.pack(">I", len(text)) + text + struct.pack(">Q", len(blob)) + blob)
    out.flush()
"""


def fake_program(folder: Path, reply: str, prelude: str = "") -> str:
    """The path of a "Python" that answers every unusual request with the frame that the expression ``reply`` makes of ``request``.

    ``prelude`` runs first; it may change ``USUAL``, the answers to what every client asks.
    """
    text = PROGRAM.format(python=sys.executable, hello=HELLO, prelude=prelude, reply=reply)
    return script(folder / "fake-python", text)


def fake_device(folder: Path, reply: str, prelude: str = "") -> Device:
    """A device on this machine whose "Python" is :func:`fake_program`."""
    return Device(transport="local", targets=(), python=fake_program(folder, reply, prelude))
