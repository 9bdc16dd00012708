"""Where the milliseconds go: dense latency in both precisions, and the time of every kernel of the exported file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import measure, time_kernels
from edgeprune.devices.timing.sustained import sustained
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import export
from edgeprune.records.artifact import Artifact
from edgeprune.records.base import Record
from edgeprune.records.measurement import Measurement
from edgeprune.records.report import LayerTime, ProfileReport

PROFILED_RUNS = 50
# onnxruntime's profiler counts whole microseconds: too coarse for a shorter net.
PROFILER_FROM_MS = 2.0
# What onnxruntime's optimiser appends to node names.
_RENAMED = re.compile(r"(_token_\d+|_nchwc)+$")


def profile(context: Context) -> ProfileReport:
    """Export the dense model, measure both precisions in the same rounds, and time each kernel.

    The runtime's own profiler is used where it has one (onnxruntime) and the net takes at least 2 ms; otherwise each kernel is cut out of
    the file and timed alone on the device, which leaves out what kernels do to each other's caches: ``covered_ratio`` says how far the
    sum is from the whole. Where the request asks for it, the faster file then runs without a pause.

    Raises:
        FormatError, DeviceError: the export fails, or the board does.
    """
    job, runtime = context.job, context.runtime_on(context.board)
    with tempfile.TemporaryDirectory(prefix="edgeprune-profile-") as scratch:
        folder = Path(scratch)
        context.progress.say(f"exporting to {job.target.format}, fp32 and int8")
        dense = export.dense_files(context, folder)
        files = {"fp32": dense.fp32, "int8": dense.int8}
        models = [context.model_file(p, folder / a.path, a) for p, a in files.items()]
        context.progress.say(f"measuring on {job.device_name}")
        measured = context.stamped(
            measure(
                context.board, models, runtime=runtime.name, threads=runtime.threads, plan=SEARCH
            )
        )
        times = {
            precision: _layer_times(
                context,
                folder,
                artifact,
                dense.cut_from("int8" if precision == "int8" else "fp32"),
                measured[precision],
            )
            for precision, artifact in files.items()
        }
        steady = None
        if job.sustained is not None:
            faster = min(models, key=lambda m: measured[m.name].median_ms)
            steady = sustained(
                context.board,
                faster,
                runtime=runtime.name,
                threads=runtime.threads,
                seconds=job.sustained,
                progress=context.progress,
            )
    return ProfileReport(
        model=job.loaded.workload.model,
        target=job.target.name,
        device=job.device_name,
        fingerprint=context.fingerprint(runtime),
        measurements=measured,
        layers=_joined(times),
        covered_ratio={
            p: sum(t.ms for t in found.values()) / measured[p].median_ms
            for p, found in times.items()
        },
        sizes={p: a.size_bytes for p, a in files.items()},
        sustained=steady,
    )


class _TimedKernels(Record):
    ms: float
    op: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    method: Literal["runtime profiler", "isolated kernel"]


def _layer_times(
    context: Context, folder: Path, artifact: Artifact, cut_from: Artifact, measured: Measurement
) -> dict[str, _TimedKernels]:
    """Time of each kernel of a file by its name, in the order of the file; single ones come from the file that can be cut."""
    runtime = context.runtime_on(context.board)
    nodes = None
    if measured.median_ms >= PROFILER_FROM_MS:
        key = f"profile-{artifact.precision}"
        content = model_bytes(folder / artifact.path)
        context.board.load(key, content, runtime=runtime.name, threads=runtime.threads)
        try:
            nodes = context.board.profile(key, PROFILED_RUNS)
        finally:
            context.board.unload([key])
    if nodes is not None:
        return {
            _RENAMED.sub("", n.name): _TimedKernels(
                ms=n.ns / 1e6,
                op=n.op,
                input_shape=(),
                output_shape=(),
                method="runtime profiler",
            )
            for n in nodes
        }
    path, runtime = folder / cut_from.path, context.kernel_runtime_on(context.board)
    file = context.form.resizable(path, path, {}, {}, context.model)
    found = time_kernels(
        context.board,
        {str(k.index): file.kernel(k.index, {}) for k in file.kernels},
        runtime=runtime.name,
        threads=runtime.threads,
        progress=context.progress,
    )
    return {
        k.name: _TimedKernels(
            ms=found[str(k.index)] / 1e6,
            op=k.op,
            input_shape=k.input_shape,
            output_shape=k.output_shape,
            method="isolated kernel",
        )
        for k in file.kernels
        if str(k.index) in found
    }


def _joined(times: Mapping[str, Mapping[str, _TimedKernels]]) -> tuple[LayerTime, ...]:
    """Both precisions side by side; a kernel that only one file has stands alone."""
    names = list(dict.fromkeys([*times["int8"], *times["fp32"]]))
    layers = []
    for name in names:
        fp32, int8 = times["fp32"].get(name), times["int8"].get(name)
        shown = int8 or fp32
        assert shown is not None
        layers.append(
            LayerTime(
                name=name,
                op=shown.op,
                input_shape=shown.input_shape,
                output_shape=shown.output_shape,
                fp32_ms=fp32.ms if fp32 else None,
                int8_ms=int8.ms if int8 else None,
                method=shown.method,
            )
        )
    return tuple(layers)
