"""The README of a bundle: how to run it, and what was measured on what."""

from __future__ import annotations

from typing import Literal

from edgeprune.bundle.card import STAMPS, judged_text
from edgeprune.bundle.manifest import Manifest
from edgeprune.records.formats import format_facts, runtime_facts


def readme_text(manifest: Manifest) -> bytes:
    """``README.md`` of the bundle; the first line says so when a gate was missed, or times are unreliable."""
    quality, latency = manifest.quality, manifest.latency
    title = f"# {manifest.name}"
    if manifest.status == "best-effort":
        title += f" - BEST EFFORT, gates missed: {', '.join(manifest.failed_gates)}"
    if latency.unreliable:
        title += " - UNRELIABLE TIMES, measure again before you rely on any"
    if manifest.not_run:
        title += f" - NOT RUN by its maker: {', '.join(manifest.not_run)}"
    model = manifest.model
    rows = [
        ("model", f"`{model.path}` ({model.precision}, {model.size_bytes} bytes)"),
        *_float_row(manifest),
        *(
            []
            if manifest.outputs == "logits"
            else [("answers", f"{manifest.outputs}, one a label")]
        ),
        ("target", f"{manifest.target} (profile {manifest.profile})"),
        ("license of the model", manifest.license or "not stated"),
        (f"{quality.metric}, {quality.split} split, n = {quality.n}", _quality(manifest)),
        (
            f"latency, {manifest.runtime.threads} thread(s)",
            f"median {latency.median_ms:.3g} ms, p90 {latency.p90_ms:.3g} ms; "
            f"limit {latency.limit_ms:.3g} ms (budget {latency.budget})",
        ),
        *([("latency gate", judged_text(latency.judged))] if latency.judged else []),
        *([("unreliable times", "; ".join(latency.unreliable))] if latency.unreliable else []),
        *([("sparsity", manifest.sparsity.line())] if manifest.sparsity else []),
        *([("left in float", ", ".join(manifest.float_layers))] if manifest.float_layers else []),
        *([("why FP32", manifest.why_fp32)] if manifest.why_fp32 else []),
        *_session_option(manifest),
        *_not_run(manifest),
        ("latency stamp", f"{STAMPS[latency.stamp]} ({latency.device})"),
        ("made by", f"edgeprune {manifest.edgeprune_version}, {manifest.created}"),
        ("seed, data, model, plan", _digests(manifest)),
    ]
    table = "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in rows)
    text = f"""{title}

{_how_to_run(manifest)}
## What it is

| | |
|---|---|
{table}
Made with:

    {" ".join(manifest.provenance.command.split())}

`preprocess.json` says how a raw sample becomes the model's input, `labels.txt` names the outputs in order, `golden/` holds real
samples with the answers of this file, and `SHA256SUMS` the digest of every file (check with `sha256sum -c SHA256SUMS`).
`samples/` holds small programs that read these files; `MODEL_CARD.md` says what was measured and what was not, `sbom/` lists the parts
and `repro/` what it takes to make this again. {_embedded(manifest)}
On the host, `edgeprune verify` checks all of it, on any board you have.
"""
    return text.encode()


def _float_row(manifest: Manifest) -> list[tuple[str, str]]:
    found = manifest.float_model
    if found is None:
        return []
    size, share = found.model.size_bytes, f"{found.quality.shipped:.2%}"
    what = f"`{found.model.path}` (fp32, {size} bytes), {found.quality.metric} {share}, not timed"
    return [("the same net in FP32, to build FP16 from", what)]


def _session_option(manifest: Manifest) -> list[tuple[str, str]]:
    """What onnxruntime has to be told so that INT8 sums are right on every processor; the sample programs do."""
    if manifest.runtime.name != "onnxruntime" or manifest.model.precision != "int8":
        return []
    text = "set `session.x64quantprecision` to `1`: on x86 without VNNI sums saturate in 16 bits without it, and answers are wrong"
    return [("session option", text)]


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


def _embedded(manifest: Manifest) -> str:
    if not manifest.embedded:
        return format_facts(manifest.model.format).readme.own_texts
    return "The model file itself carries its name, preprocessing and labels, so that it can be told apart without this folder."


def _how_to_run(manifest: Manifest) -> str:
    if any(file.path.startswith("samples/android/") for file in manifest.files):
        return f"## Run it in an Android app\n\n{_android_text(manifest)}"
    return f"## Run it on the board\n\n{_run_text(manifest)}"


def _android_text(manifest: Manifest) -> str:
    runtime = manifest.runtime
    package = runtime_facts(runtime.name).install
    return f"""1. Copy `models/`, `golden/`, `preprocess.json` and `labels.txt` into `app/src/main/assets/edgeprune/`.
2. Take the lines of `samples/android/build.gradle.kts` into the app's; this file was tried with
   release {runtime.min_version}.
3. Add `samples/android/EdgepruneModel.kt` to the sources: `EdgepruneModel(context).classify(bitmap)` gives labels with scores, and
   `goldenCheck()` says whether the phone answers as this bundle says.

The tests of edgeprune compile the sample against Android's API level 23 and declarations of ExecuTorch's API, and run its golden check on a
desktop JVM with a stand-in for the model. Nobody built it into an app, and nothing here was run on a phone unless the stamp below says so.
`golden/` also holds the model with its samples inside, for ExecuTorch's own `executor_runner` built with bundled programs.
On a computer with Python, `pip install numpy pillow {package}` and `python samples/python/predict.py --check` run the same file.
"""


def _run_text(manifest: Manifest) -> str:
    facts, twin = format_facts(manifest.model.format), manifest.float_model
    if not facts.readme.run:
        return _python_text(manifest)
    path, float_path = manifest.model.path, twin.model.path if twin else ""
    which: Literal["both", "int8", "fp32"] = (
        "both" if twin else "int8" if manifest.model.precision == "int8" else "fp32"
    )
    built = facts.readme.builds.get(which, "").format(path=path, float_path=float_path)
    text = facts.readme.run.format(name=manifest.name, model=path, built=built)
    if manifest.runtime.name in facts.runtimes:
        return text
    return f"{text}\n{facts.readme.elsewhere}\n\n{_python_text(manifest)}"


def _python_text(manifest: Manifest) -> str:
    runtime = manifest.runtime
    package = runtime_facts(runtime.name).install
    if not package:
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
