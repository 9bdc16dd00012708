"""The README of a bundle: how to run it, and what was measured on what."""

from __future__ import annotations

from edgeprune.bundle.manifest import Manifest

_PACKAGES = {
    "litert": "ai-edge-litert",
    "tflite-runtime": "tflite-runtime 'numpy<2'",
    "onnxruntime": "onnxruntime",
}
_IOS_TEXT = """1. Drag `{model}` into your Xcode project, and tick your target. Xcode shows its inputs, outputs, labels and
   metadata, compiles it, and makes the Swift class `Classifier`. iOS 17 or newer.
2. Add `samples/ios/GoldenCheck.swift`, `labels.txt`, `preprocess.json` and the files in `golden/` to the app (a debug target
   is enough), and call `try GoldenCheck(bundle: .main).run()` once on the device: it says whether Core ML there gives the golden answers.
3. Choose the processors by `{units}`; `.all` is the default.
"""
_STAMPS = {
    "measured": "measured on the board",
    "stand-in": "stand-in: measured on another machine, not on the board",
    "emulated": "emulated: the time says nothing about the board",
}


def readme_text(manifest: Manifest) -> bytes:
    """``README.md`` of the bundle; the first line says so when a gate was missed."""
    quality, latency = manifest.quality, manifest.latency
    title = f"# {manifest.name}"
    if manifest.status == "best-effort":
        title += f" - BEST EFFORT, gates missed: {', '.join(manifest.failed_gates)}"
    if manifest.not_run:
        title += f" - NOT RUN by its maker: {', '.join(manifest.not_run)}"
    model = manifest.model
    rows = [
        ("model", f"`{model.path}` ({model.precision}, {model.size_bytes} bytes)"),
        ("target", f"{manifest.target} (profile {manifest.profile})"),
        ("license of the model", manifest.license or "not stated"),
        (f"{quality.metric}, {quality.split} split, n = {quality.n}", _quality(manifest)),
        (
            f"latency, {manifest.runtime.threads} thread(s)",
            f"median {latency.median_ms:.3g} ms, p90 {latency.p90_ms:.3g} ms; "
            f"limit {latency.limit_ms:.3g} ms (budget {latency.budget})",
        ),
        *_not_run(manifest),
        ("latency stamp", f"{_STAMPS[latency.stamp]} ({latency.device})"),
        ("made by", f"edgeprune {manifest.edgeprune_version}, {manifest.created}"),
        ("seed, data, model, plan", _digests(manifest)),
    ]
    table = "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in rows)
    text = f"""{title}

## Run it on the board

{_run_text(manifest)}
## What it is

| | |
|---|---|
{table}
Made with:

    {" ".join(manifest.provenance.command.split())}

`preprocess.json` says how a raw sample becomes the model's input, `labels.txt` names the outputs in order, `golden/` holds real
samples with the answers of this file, and `SHA256SUMS` the digest of every file (check with `sha256sum -c SHA256SUMS`).
On the host, `edgeprune verify` checks all of it, on any board you have.
"""
    return text.encode()


def _not_run(manifest: Manifest) -> list[tuple[str, str]]:
    if not manifest.not_run:
        return []
    text = "this file was converted and never run; times and quality are of another format of the same net"
    sources = {
        "run": "",
        "worked-out": "; the golden answers were worked out from the operations in it",
        "twin": ", and so are the golden answers",
    }
    return [("not run", text + sources[manifest.golden_source])]


def _run_text(manifest: Manifest) -> str:
    runtime = manifest.runtime
    if runtime.name == "coreml":
        return _IOS_TEXT.format(
            model=manifest.model.path, units="MLModelConfiguration.computeUnits"
        )
    package = _PACKAGES.get(runtime.name)
    if package is None:
        return (
            f"The model runs with {runtime.name} {runtime.min_version} or newer; "
            "`samples/python/predict.py` shows the preprocessing.\n"
        )
    return f"""```sh
scp -r . USER@BOARD:{manifest.name} && ssh USER@BOARD
python3 -m venv ~/venv && . ~/venv/bin/activate && cd {manifest.name}
pip install numpy pillow {package}
python samples/python/predict.py --check
python samples/python/predict.py YOUR_IMAGE.png
```

Tried with {runtime.name} {runtime.min_version}.
"""


def _quality(manifest: Manifest) -> str:
    quality = manifest.quality
    change = 100 * (quality.shipped - quality.dense)
    return f"{quality.shipped:.2%} shipped, {quality.dense:.2%} dense ({change:+.2f} percentage points)"


def _digests(manifest: Manifest) -> str:
    made = manifest.provenance
    digests = (made.data_digest, made.model_digest, made.plan_digest)
    return ", ".join([str(made.seed), *(digest[:16] for digest in digests)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
