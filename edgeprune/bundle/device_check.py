"""What a loaded bundle does on a board: its golden answers, who computes them, and how long it takes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

from edgeprune.bundle.golden import judge, read_golden
from edgeprune.bundle.manifest import Manifest
from edgeprune.bundle.on_board import run_model
from edgeprune.devices.board import Board
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.plans import Loaded, TimingPlan
from edgeprune.errors import Busy, NotReady, Unreliable
from edgeprune.records.base import Record
from edgeprune.records.formats import format_facts
from edgeprune.records.statistics import centre

Status = Literal["passed", "failed", "not-run"]
MIN_DELEGATED_RATIO = 0.5  # below it the kernels that were measured are not the ones that run
MIN_LATENCY_ROOM = 0.05
_PLAN = TimingPlan(rounds=9, block_ms=100.0, min_runs=5, max_runs=500, warmup_ms=500.0)
_NO_INT8_IN_XNNPACK = "tflite-runtime"  # 2.14, its last release, gives XNNPACK no INT8 operator
_FLOAT_COMPUTE = ("Conv", "Gemm", "MatMul", "ConvTranspose", "FusedConv", "FusedGemm")


class Check(Record):
    """One thing that was looked at within a level."""

    name: str
    status: Status
    detail: str


def golden_check(
    board: Board, folder: Path, manifest: Manifest, key: str = "model", name: str = "golden"
) -> Check:
    """Whether a board's answers are the golden ones, within the tolerance and with the same classes."""
    raw, golden = read_golden(folder, manifest)
    result = judge(run_model(board, manifest, raw, key=key), golden, manifest)
    return Check(name=name, status="passed" if result.ok else "failed", detail=str(result))


def delegate_check(board: Board, manifest: Manifest, loaded: Loaded, *, must: bool) -> Check:
    """Whether the fast kernels take part: XNNPACK's share of the work, or onnxruntime's 8-bit nodes on its CPU provider.

    XNNPACK's share is that of the operators; of a ``.pte`` it is that of the multiply-accumulates, which the manifest counts.

    Args:
        board: where the model is loaded as ``model``.
        manifest: of the bundle.
        loaded: what the board said of it.
        must: whether a delegate that is not there at all is a failure; on stand-ins it says nothing about the target.
    """
    known = format_facts(manifest.model.format)
    if known.stand_in_computes and manifest.runtime.name not in known.runtimes:
        return _not_run("delegate", known.stand_in_computes)
    if manifest.runtime.name == "onnxruntime":
        return _onnxruntime_check(board, manifest)
    if known.counts_delegate:
        return _counts_check(manifest)
    if loaded.delegated is None or loaded.delegated[1] == 0:
        return _not_run("delegate", f"{manifest.runtime.name} does not tell who computes what")
    taken, operators = loaded.delegated
    detail = f"XNNPACK took {taken} of {operators} operators"
    if manifest.runtime.name == _NO_INT8_IN_XNNPACK and manifest.model.precision == "int8":
        why = f"{_NO_INT8_IN_XNNPACK} has no XNNPACK kernels for INT8"
        return _not_run("delegate", f"{detail}: {why}, its built-in kernels run the INT8 operators")
    if taken == 0 and not must:
        return _not_run("delegate", f"{detail}: {board.name} runs without it")
    return Check(
        name="delegate", status=_status(taken / operators, MIN_DELEGATED_RATIO), detail=detail
    )


def _counts_check(manifest: Manifest) -> Check:
    """The conversion fixed what XNNPACK runs, so that its counts hold on every board; level 3 compared them with the file."""
    counts = manifest.model.op_counts
    if not counts.get("macs") or "macs:xnnpack" not in counts:
        return _not_run("delegate", "the manifest does not count the multiply-accumulates")
    share = counts["macs:xnnpack"] / counts["macs"]
    detail = f"XNNPACK runs {share:.0%} of the multiply-accumulates, as counted in the file"
    return Check(name="delegate", status=_status(share, MIN_DELEGATED_RATIO), detail=detail)


def _onnxruntime_check(board: Board, manifest: Manifest) -> Check:
    try:
        nodes = board.profile("model", 1)
    except Refusal as error:
        if error.kind == "lease":
            return _not_run("delegate", f"{board.name} was not to be had alone")
        raise
    if not nodes:
        return _not_run("delegate", "onnxruntime told of no node")
    providers = {
        name: sum(node.provider == name for node in nodes) for name in {n.provider for n in nodes}
    }
    shown = ", ".join(f"{count} on {name}" for name, count in sorted(providers.items()))
    detail = f"{len(nodes)} nodes, {shown}"
    if manifest.model.precision != "int8":
        return Check(name="delegate", status="passed", detail=detail)
    eight_bit = sum(
        node.op.startswith("QLinear") or node.op in ("QGemm", "MatMulInteger", "ConvInteger")
        for node in nodes
    )
    # Layers that were left in float on purpose could not, by the maker's own choice.
    heavy = sum(node.op in _FLOAT_COMPUTE for node in nodes) - len(manifest.float_layers)
    heavy = max(0, heavy)
    share = eight_bit / (eight_bit + heavy) if eight_bit + heavy else 0.0
    detail += f"; {eight_bit} compute in 8 bits, {heavy} that could do not"
    return Check(name="delegate", status=_status(share, MIN_DELEGATED_RATIO), detail=detail)


def latency_check(board: Board, manifest: Manifest) -> Check:
    """Whether the loaded model is as fast as its manifest says, or within its budget.

    Judged is the upper end of the 99 % interval of the block medians, as the latency gate is. Allowed is the larger of the budget and the
    manifest's median plus a share of it: 5 %, or twice the half-width of that interval where that is more. Times of a machine that is
    neither the one of the manifest nor a real board are not judged.
    """
    runtime, wanted = manifest.runtime, manifest.latency
    found = board.fingerprint(runtime.name, runtime.threads)
    if found.stamp != "measured" and found.key() != wanted.fingerprint_key:
        return _not_run(
            "latency",
            f"times of {board.name} are {found.stamp}, and not of the manifest's {wanted.device}",
        )
    try:
        timing = board.time(["model"], _PLAN)
    except (Busy, NotReady, Unreliable) as reason:
        return _not_run("latency", str(reason))
    except Refusal as error:
        if error.kind == "lease":
            return _not_run("latency", f"{board.name} was not to be had alone")
        raise
    medians = [
        statistics.median(block.samples_ns) / 1e6
        for block in timing.blocks["model"]
        if block.rejected is None
    ]
    around = centre(medians)
    half_width = (around.high - around.low) / 2 / around.estimate
    room = max(MIN_LATENCY_ROOM, 2 * half_width)
    allowed = max(wanted.limit_ms, wanted.median_ms * (1 + room))
    median = statistics.median(medians)
    high = max(median, around.high)
    detail = (
        f"median {median:.4g} ms, up to {high:.4g} (allowed {allowed:.4g}; the manifest says {wanted.median_ms:.4g}, "
        f"the budget {wanted.limit_ms:.4g})"
    )
    return Check(name="latency", status="passed" if high <= allowed else "failed", detail=detail)


def _status(share: float, least: float) -> Status:
    return "passed" if share >= least else "failed"


def _not_run(name: str, why: str) -> Check:
    return Check(name=name, status="not-run", detail=why)
