"""What the board answers: operations on models, files, the lease and the board's own state, one request at a time.

The program ends, with everything it started, when stdin ends, when the client has been silent for longer than its lease allows, and on
SIGTERM, even in the middle of a request: a lost client never leaves the board busy.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple

from . import environments, telemetry, tuning, validity
from .cache import Cache
from .journal import Journal
from .lease import Lease
from .machine import machine_facts, usable_cpus
from .runtimes import LOAD_S, MODULES
from .timing import TimedBlocks, check_plan
from .wire import MAGIC, Message, Refused, error_frame, read_frame, write_frame
from .workers import Cancelled, WorkerProcess, own_python

ALIVE_S = 2.5
DEFAULT_TTL_S = 30.0
SHARED_LOCK = "/run/lock/edgeprune.lock"
LIMITS = {
    "soft_limit_c": 80.0, "start_below_c": 60.0, "wait_s": 0.0,
    "foreign_cpu_ratio": 0.05, "load_per_core": 0.3, "clock_ratio": 0.97, "patience_s": 30.0,
}  # fmt: skip


class Client:
    """What the client said of itself in its first request, and what belongs to it on this board."""

    def __init__(self, request: Dict[str, Any]) -> None:
        home = os.path.expanduser("~")
        self.workdir = os.path.join(home, os.path.expanduser(str(request["workdir"])))
        self.session = str(request["session"])
        about = request.get("client") or {}
        self.owner = {name: str(about.get(name, ""))[:100] for name in ("user", "host", "job")}
        self.limits = dict(LIMITS)
        for name, value in (request.get("limits") or {}).items():
            if name in self.limits:
                self.limits[name] = float(value)
        os.makedirs(self.workdir, mode=0o700, exist_ok=True)
        self.cache = Cache(
            self.workdir, int(request["min_free_bytes"]), int(request["quota_bytes"])
        )
        self.journal = Journal(self.workdir, self.session)
        self.journal.sweep()
        given = request.get("lease_file")
        own = os.path.join(self.workdir, "edgeprune.lock")
        paths = [os.path.join(home, os.path.expanduser(given))] if given else [SHARED_LOCK, own]
        self.lease = Lease(paths)


class Agent:
    """Serves one client. Each operation takes a header and a blob and gives a header and a blob.

    Args:
        program: the path of this program's own file, to start workers from.
        stream: where frames go.
    """

    def __init__(self, program: str, stream: BinaryIO) -> None:
        self._program, self._stream = program, stream
        self._write_lock = threading.Lock()
        self._client: Optional[Client] = None
        self._workers: Dict[str, WorkerProcess] = {}  # by model key
        self._busy_with: Optional[int] = None
        self._cancelled: Optional[int] = None
        self._affinity: List[int] = []
        self.heard_at = time.monotonic()
        self.ttl_s = DEFAULT_TTL_S
        self.operations: Dict[str, Callable[[Dict[str, Any], bytes], Message]] = {
            name: getattr(self, "op_" + name)
            for name in (
                "hello", "lease", "release", "who", "break", "status", "clean", "restore", "tune", "runtime", "ready",
                "env_list", "env_install", "cache_state", "cache_write", "load", "load_many", "unload", "time", "infer", "profile",
                "result",
            )
        }  # fmt: skip

    # The client and the lease

    @property
    def client(self) -> Client:
        """Who is served.

        Raises:
            Refused: nobody has said hello yet.
        """
        if self._client is None:
            raise Refused("request", "the first request must be hello")
        return self._client

    def op_hello(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Facts about this machine; sets up what belongs to the client, unless it is known and says nothing new."""
        if self._client is not None and "workdir" not in request:
            return machine_facts(), b""
        try:
            self._client = client = Client(request)
        except OSError as error:
            raise Refused("workdir", "cannot use the workdir: %s" % error) from error
        self.ttl_s = float(request.get("ttl_s", DEFAULT_TTL_S))
        if not client.lease.is_taken():  # whoever changed settings and died is gone
            with contextlib.suppress(Refused):  # `devices restore` says what is in the way
                tuning.restore("/", client.workdir)
        facts = machine_facts()
        self._affinity = facts["affinity"] or []
        return facts, b""

    def op_lease(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Take the board for this client."""
        self.client.lease.acquire(self.client.owner, self.client.session)
        return {"lease_file": self.client.lease.path}, b""

    def op_release(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Free the board: its models, its settings, its lock."""
        self._end_workers()
        try:
            if self.client.lease.held:
                tuning.restore("/", self.client.workdir)
        finally:
            self.client.lease.release()
        return {}, b""

    def op_who(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Who holds the lease."""
        return {"owner": self.client.lease.owner()}, b""

    def op_break(self, request: Dict[str, Any], blob: bytes) -> Message:
        """End the client that holds the lease, if it runs as the same user."""
        owner = self.client.lease.owner()
        return {"owner": owner, "ended": self.client.lease.end_holder()}, b""

    def op_status(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The state of the board and of what edgeprune keeps on it."""
        client = self.client
        problem = None
        try:
            environments.check_workdir(client.workdir)
        except Refused as error:
            problem = str(error)
        found = os.statvfs(client.workdir)
        return {
            "lease_file": client.lease.path,
            "owner": client.lease.owner(),
            "mine": client.lease.held,
            "workdir": client.workdir,
            "disk_free_bytes": found.f_bavail * found.f_frsize,
            "cache_bytes": client.cache.size_bytes(),
            "environments": environment_sizes(client.workdir),
            "telemetry": telemetry.snapshot(),
            "workdir_problem": problem,
            "tuned": os.path.exists(os.path.join(client.workdir, "tuning.json")),
        }, b""

    def op_clean(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Remove cached files; with ``all``, the environments too."""
        freed = self.client.cache.trim(0)
        if request.get("all"):
            freed += sum(entry["bytes"] for entry in environment_sizes(self.client.workdir))
            environments.remove(self.client.workdir, keep=())
        kept = sum(entry["bytes"] for entry in environment_sizes(self.client.workdir))
        return {"freed_bytes": freed, "kept_bytes": kept + self.client.cache.size_bytes()}, b""

    def op_restore(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Put back every setting that was changed for a measurement."""
        return {"restored": tuning.restore("/", self.client.workdir)}, b""

    def op_tune(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Change settings for measurements; they are put back when this program ends."""
        self._need_lease()
        return {"changed": tuning.apply("/", self.client.workdir, str(request["governor"]))}, b""

    def _need_lease(self) -> None:
        if not self.client.lease.held:
            raise Refused("lease", "this client does not hold the board")

    # Runtimes and files

    def op_runtime(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Version of an installed runtime."""
        name = str(request["name"])
        return {"version": environments.probe(self._python(name), name)}, b""

    def _python(self, runtime: str) -> str:
        """The interpreter for a runtime: that of its environment, else the one that runs this program."""
        if runtime not in MODULES:
            raise Refused("runtime", "this agent cannot run the runtime " + runtime)
        return environments.python_for(self.client.workdir, runtime) or own_python()

    def op_env_list(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The environments of runtimes; the preferred one of a runtime comes first."""
        return {"environments": environments.listed(self.client.workdir)}, b""

    def op_env_install(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Make an environment from wheels that are in the cache."""
        self._need_lease()
        client = self.client
        return environments.install(client.workdir, own_python(), request, client.cache.path), b""

    def op_cache_state(self, request: Dict[str, Any], blob: bytes) -> Message:
        """How much of a file is here."""
        return self.client.cache.state(str(request["sha256"])), b""

    def op_cache_write(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Add a piece to a file."""
        sizes = (int(request["size"]), int(request["offset"]))
        return self.client.cache.write(str(request["sha256"]), *sizes, blob), b""

    # Models

    def op_load(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load one model in a process of its own and run it once."""
        key = str(request["key"])
        sizes = [len(self.client.cache.read(str(request["sha256"])))]
        found = self._load(dict(request, keys=[key], sizes=sizes))[key]
        if "error" in found:
            self._forget([key])
            raise Refused(found["kind"], found["error"])
        return found, b""

    def op_load_many(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load small models that share a process; where one of them ends it, the others are tried without it."""
        try:
            found = self._load(request)
            failed = [key for key, model in found.items() if "error" in model]
            self._forget(failed)
            return {"models": {**found, **{k: {"error": found[k]["error"]} for k in failed}}}, b""
        except Refused as error:
            if error.kind not in ("crash", "memory", "timeout") or len(request["keys"]) < 2:
                return {"models": {key: {"error": str(error)} for key in request["keys"]}}, b""
        models: Dict[str, Any] = {}
        start, half = 0, (len(request["keys"]) + 1) // 2
        for keys, sizes in (
            (request["keys"][:half], request["sizes"][:half]),
            (request["keys"][half:], request["sizes"][half:]),
        ):
            part = dict(request, keys=keys, sizes=sizes, skip=request.get("skip", 0) + start)
            models.update(self.op_load_many(part, b"")[0]["models"])
            start += sum(sizes)
        return {"models": models}, b""

    def _load(self, request: Dict[str, Any]) -> Dict[str, Any]:
        content = self.client.cache.read(str(request["sha256"]))
        start = request.get("skip", 0)
        content = content[start : start + sum(request["sizes"])]
        keys = [str(key) for key in request["keys"]]
        self._forget(keys)
        worker = WorkerProcess(
            self._python(str(request["runtime"])),
            self._program,
            self._processors(int(request["threads"])),
            self._attend,
            os.path.join(self.client.workdir, "worker.log"),
            self.client.limits["patience_s"],
        )
        self._workers.update(dict.fromkeys(keys, worker))
        header = {
            "op": "load", "keys": keys, "sizes": request["sizes"], "runtime": str(request["runtime"]),
            "threads": int(request["threads"]), "delegate": bool(request.get("delegate", True)),
        }  # fmt: skip
        try:
            one_s = LOAD_S.get(header["runtime"], 1.0)
            reply, _ = worker.ask(header, content, expected_s=10 + one_s * len(keys))
        except BaseException:
            self._forget(keys)
            raise
        models: Dict[str, Any] = reply["models"]
        return models

    def _processors(self, threads: int) -> List[int]:
        """The processors of every model with so many threads: two on different ones would differ by what these differ."""
        return (self._affinity or usable_cpus())[-threads:]

    def _worker(self, key: str) -> WorkerProcess:
        if key not in self._workers:
            raise Refused("unknown-key", "no model is loaded as " + key)
        return self._workers[key]

    def op_unload(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Forget models; a key that is not loaded is no error."""
        self._forget([str(key) for key in request["keys"]])
        return {}, b""

    def _forget(self, keys: List[str]) -> None:
        """Drop models; a process that holds none any more is ended."""
        dropped = {id(w): w for w in (self._workers.pop(key, None) for key in keys) if w}
        used = {id(worker) for worker in self._workers.values()}
        for number, worker in dropped.items():
            if number not in used:
                worker.end()

    def _end_workers(self) -> None:
        self._forget(list(self._workers))

    def op_ready(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Wait until the board is fit to be measured; ``reasons`` says what it still is not."""
        reasons = validity.wait_until_ready(
            "/",
            dict(self.client.limits, wait_s=float(request.get("wait_s", 0.0))),
            int(request.get("expected_bytes", 0)),
            self._own_pids,
            alive=self._attend,
        )
        return {"reasons": reasons, "telemetry": telemetry.snapshot()}, b""

    def _own_pids(self) -> List[int]:
        return [os.getpid(), *{worker.pid for worker in self._workers.values()}]

    def op_time(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Time loaded models in the same rounds, and remember the result for a client whose link breaks."""
        self._need_lease()
        plan = check_plan(request)
        models = {str(key): self._worker(str(key)) for key in request["keys"]}
        watch = validity.Watch("/", self._own_pids, self.client.limits)
        before = telemetry.snapshot()
        session = TimedBlocks(models, plan, watch.start, watch.lap)
        try:
            stopped = session.run()
        except Refused as error:
            if error.kind in ("crash", "memory", "timeout"):
                self._forget([key for key, w in models.items() if not w.is_running()])
            elif error.kind == "load":  # a model that did not load again is lost
                self._forget(list(models))
            raise
        spent = {key: worker.ask({"op": "spent", "key": key})[0] for key, worker in models.items()}
        result = {
            "blocks": session.blocks,
            "before": before,
            "after": telemetry.snapshot(),
            "peak_memory_bytes": {key: found["peak_memory_bytes"] for key, found in spent.items()},
            "inside_ns": {key: found["inside_ns"] for key, found in spent.items()},
            "stop_reason": stopped,
            "notes": session.notes[:20],
        }
        if request.get("op_id"):
            self.client.journal.add(str(request["op_id"]), result)
        return result, b""

    def op_result(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The result of an earlier operation of this session.

        Raises:
            Refused: ``missing`` when it was not finished.
        """
        found = self.client.journal.find(str(request["op_id"]))
        if found is None:
            raise Refused("missing", "that operation was not finished")
        return found, b""

    def op_infer(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Outputs of a loaded model for an array."""
        key = str(request["key"])
        expected_s = float(request.get("expected_s", 60.0))
        return self._worker(key).ask({"op": "infer", "key": key}, blob, expected_s=expected_s)

    def op_profile(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Time of every node of a loaded model, where the runtime can tell."""
        self._need_lease()
        key = str(request["key"])
        header = {"op": "profile", "key": key, "runs": int(request["runs"])}
        return self._worker(key).ask(header, expected_s=float(request.get("expected_s", 60.0)))

    # The link

    def _attend(self) -> None:
        """Called while a worker works: stop when the client no longer wants the answer."""
        if self._cancelled is not None and self._cancelled == self._busy_with:
            raise Cancelled

    def cancel(self, number: Any) -> None:
        """The client gave up on a request; called by the thread that reads."""
        self._cancelled = number if isinstance(number, int) else None

    def serve(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The reply to one request; any failure becomes a reply, so one bad model never ends the program."""
        number = request.get("id")
        self._busy_with = number if isinstance(number, int) else None
        try:
            operation = self.operations.get(str(request.get("op", "")))
            if operation is None:
                raise Refused("unsupported", "unknown operation %r" % request.get("op"))
            header, answer = operation(request, blob)
            return dict(header, id=number, ok=True), answer
        except Cancelled:
            return error_frame(number, Refused("cancelled", "cancelled by the client")), b""
        except Exception as error:
            return error_frame(number, error), b""
        finally:
            self._busy_with = None

    def send(self, header: Dict[str, Any], blob: bytes = b"") -> None:
        """Write one frame; whole, whichever thread asks."""
        with self._write_lock:
            write_frame(self._stream, header, blob)

    def watch_link(self) -> None:
        """Say that the board lives while it works, and end everything when the client has been silent too long."""
        said_at = time.monotonic()
        while True:
            time.sleep(0.25)
            now = time.monotonic()
            if now - self.heard_at > self.ttl_s:
                self.end("the client was silent for over %g s" % self.ttl_s)
            if self._busy_with is not None and now - said_at >= ALIVE_S:
                said_at = now
                with contextlib.suppress(OSError, ValueError):
                    self.send({"event": "alive"})

    def end(self, why: str = "") -> None:
        """End the workers, put settings back, free the lease, and leave; safe from any thread."""
        with contextlib.suppress(Exception):
            for worker in list(self._workers.values()):
                worker.end()
        if self._client is not None:
            with contextlib.suppress(Exception):
                if self._client.lease.held:
                    tuning.restore("/", self._client.workdir)
            with contextlib.suppress(Exception):
                self._client.lease.release()
        if why:
            print("edgeprune agent: " + why, file=sys.stderr, flush=True)
        os._exit(0)


def environment_sizes(workdir: str) -> List[Dict[str, Any]]:
    """Name, runtime, version and size of every environment that counts."""
    return [
        {
            "name": found["name"],
            "runtime": found["runtime"],
            "version": found["version"],
            "bytes": size_bytes(os.path.join(workdir, "env", found["name"])),
        }
        for found in environments.listed(workdir)
    ]


def size_bytes(folder: str) -> int:
    """What the files below a folder hold together."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def read_requests(
    stream: BinaryIO, agent: Agent, requests: queue.Queue[Tuple[Dict[str, Any], bytes]]
) -> None:
    """Queue requests until the client is gone; then end the program at once, whatever it is doing."""

    def heard() -> None:
        agent.heard_at = time.monotonic()

    try:
        while True:
            header, blob = read_frame(stream, heard)
            if header.get("op") == "cancel":
                agent.cancel(header.get("id"))
            elif header.get("op") != "beat":
                requests.put((header, blob))
    except Exception:
        agent.end()


def main(program: str) -> None:
    """Serve until stdin ends."""
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may land between frames
    agent = Agent(program, wire)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: agent.end("ended by a signal"))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("0")
    requests: queue.Queue[Tuple[Dict[str, Any], bytes]] = queue.Queue(2)
    for work in (
        lambda: read_requests(sys.stdin.buffer, agent, requests),
        agent.watch_link,
    ):
        threading.Thread(target=work, daemon=True).start()
    wire.write(MAGIC)
    wire.flush()
    while True:
        header, blob = requests.get()
        if header.get("op") == "bye":
            with contextlib.suppress(Exception):
                agent.op_release({}, b"")
                agent.send({"id": header.get("id"), "ok": True})
            agent.end()
        agent.send(*agent.serve(header, blob))
