"""The texts of a bundle that a lawyer and a reviewer read: ``MODEL_CARD.md``, ``LICENSE`` and ``NOTICE``."""

from __future__ import annotations

from edgeprune.bundle.manifest import NOT_STATED, Judged, Manifest, Quality

STAMPS = {
    "measured": "measured on the board",
    "stand-in": "stand-in: measured on another machine, not on the board",
    "emulated": "emulated: the time says nothing about the board",
}


def card_text(manifest: Manifest) -> bytes:
    """``MODEL_CARD.md``: what the model is, what was measured on what, and what was not."""
    model, latency, made = manifest.model, manifest.latency, manifest.provenance
    source = model.inputs[0]
    qualities = [manifest.quality, *([manifest.test] if manifest.test else [])]
    accuracy = "".join(f"- {_quality(q)}\n" for q in qualities)
    judged = f"\nThe gate: {judged_text(latency.judged)}." if latency.judged else ""
    labels = ", ".join(manifest.labels[:10]) + (", ..." if len(manifest.labels) > 10 else "")
    text = f"""# Model card: {manifest.name}

{_unreliable(manifest)}## What

An image or tensor classifier with {len(manifest.labels)} classes ({labels}), pruned, retrained and exported by edgeprune
{manifest.edgeprune_version} for {manifest.target}. `{model.path}` ({model.precision}, {model.size_bytes} bytes) runs on
{manifest.runtime.name}; it takes `{source.dtype} {list(source.shape)}` ({source.layout}). Version: {manifest.version or NOT_STATED}.
{_outputs(manifest)}{_sparsity(manifest)}{_float_model(manifest)}
## Data

Digest of the data set: `{made.data_digest}`. Seed: {made.seed}. The data themselves are not part of the bundle, except for
{manifest.golden.n} samples in `golden/`. Where they came from, whom they show and how they were labelled: {NOT_STATED}.

## Accuracy

{accuracy}
## Latency

Median {latency.median_ms:.3g} ms, p90 {latency.p90_ms:.3g} ms with {manifest.runtime.threads} thread(s) on {latency.device};
{STAMPS[latency.stamp]}. Budget: {latency.budget}, which is {latency.limit_ms:.3g} ms.{judged}

## Limits

{_limits(manifest)}
## License

{manifest.license or NOT_STATED}
"""
    return text.encode()


def license_text(manifest: Manifest) -> bytes:
    """``LICENSE``: the SPDX identifier that the maker gave, or that there is none."""
    if manifest.license is None:
        text = (
            f"License of the model: {NOT_STATED}.\n\nNobody may assume any permission to use or copy it. "
            "Its maker can state one with the key `license` of edgeprune.yaml.\n"
        )
    else:
        text = (
            f"SPDX-License-Identifier: {manifest.license}\n\n"
            "This is the license of the model, as its maker stated it. Its text stands at https://spdx.org/licenses.\n"
        )
    return text.encode()


def notice_text(manifest: Manifest) -> bytes:
    """``NOTICE``: whose work lies beside the model."""
    text = f"""{manifest.name} was made with edgeprune {manifest.edgeprune_version}.

The programs in samples/ are part of edgeprune and licensed under Apache-2.0.
The runtime, {manifest.runtime.name}, is not part of the bundle and has its own license.
"""
    return text.encode()


def _quality(quality: Quality) -> str:
    change = 100 * (quality.shipped - quality.dense)
    return (
        f"{quality.metric} on the {quality.split} split (n = {quality.n}): {quality.shipped:.2%} shipped, "
        f"{quality.dense:.2%} dense, {change:+.2f} points"
    )


def _outputs(manifest: Manifest) -> str:
    if manifest.outputs == "logits":
        return ""
    return "It answers with probabilities, one for each class.\n"


def judged_text(found: Judged) -> str:
    """What the latency gate found and held against the limit, in words."""
    return (
        f"{found.value:.4g} {found.unit}, between {found.low:.4g} and {found.high:.4g};"
        f" judged on the upper end, the limit is {found.limit:.4g}"
    )


def _unreliable(manifest: Manifest) -> str:
    reasons = "; ".join(manifest.latency.unreliable)
    if not reasons:
        return ""
    return f"**Unreliable times.** {reasons}. Measure again before you rely on any time in this bundle.\n\n"


def _sparsity(manifest: Manifest) -> str:
    return f"\nIts {manifest.sparsity.line()}.\n" if manifest.sparsity else ""


def _float_model(manifest: Manifest) -> str:
    found = manifest.float_model
    if found is None:
        return ""
    return (
        f"\n`{found.model.path}` is the same net in FP32, from which the board builds FP16 to compare; "
        f"{_quality(found.quality)}. It was not timed.\n"
    )


def _limits(manifest: Manifest) -> str:
    limits = [
        "Accuracy is that of data like the data set above; other cameras, light or subjects were not looked at.",
        "Fairness, calibration of the scores and behaviour on other inputs were not measured.",
    ]
    if manifest.failed_gates:
        limits.insert(0, f"Gates missed: {', '.join(manifest.failed_gates)}.")
    if manifest.latency.stamp != "measured":
        limits.append("The latency was not measured on the board.")
    if manifest.test is None:
        limits.append(
            "There was no test split: the accuracy above is of the split that choices were made on."
        )
    if manifest.quality.metric == "agreement":
        limits.append(
            "There were no labels: agreement with the dense model is not accuracy, and that it is a classifier is its maker's word."
        )
    return "".join(f"- {limit}\n" for limit in limits)
