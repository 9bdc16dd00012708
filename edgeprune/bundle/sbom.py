"""``sbom/bom.cdx.json``: the bundle as a CycloneDX 1.6 machine-learning bill of materials.

Source: https://cyclonedx.org/docs/1.6/json (read 2026-11-25): ``machine-learning-model`` components with ``modelCard``.
"""

from __future__ import annotations

import uuid
from typing import Any

from edgeprune.bundle.manifest import Manifest, Quality
from edgeprune.records.files import to_json_text
from edgeprune.records.formats import runtime_facts

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of URLs, RFC 9562


def bom_text(manifest: Manifest) -> bytes:
    """The bill of materials; everything in it stands in the manifest."""
    runtime = manifest.runtime
    needed: dict[str, Any] = {
        "type": "library",
        "bom-ref": "runtime",
        "name": runtime.name,
        "version": runtime.min_version,
    }
    if package := runtime_facts(runtime.name).purl:
        needed["purl"] = f"{package}@{runtime.min_version}"
    tool = {"type": "application", "name": "edgeprune", "version": manifest.edgeprune_version}
    value = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest.manifest_id)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created,
            "tools": {"components": [tool]},
            "component": _model(manifest),
        },
        "components": [*_float_model(manifest), needed],
        "dependencies": [{"ref": "model", "dependsOn": ["runtime"]}, {"ref": "runtime"}],
    }
    return to_json_text(value)


def _float_model(manifest: Manifest) -> list[dict[str, Any]]:
    """The FP32 file beside an INT8 one, where there is one."""
    twin = manifest.of_float()
    if twin is None:
        return []
    digest = {"alg": "SHA-256", "content": twin.model.sha256}
    name = f"{manifest.name} in FP32"
    kind = "machine-learning-model"
    return [{"type": kind, "bom-ref": "float-model", "name": name, "hashes": [digest]}]


def _model(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "hashes": [{"alg": "SHA-256", "content": manifest.model.sha256}],
        "modelCard": {
            "modelParameters": {
                "task": manifest.task,
                "datasets": [
                    {"type": "dataset", "name": f"digest {manifest.provenance.data_digest}"}
                ],
                "inputs": [{"format": f"{t.dtype} {list(t.shape)}"} for t in manifest.model.inputs],
                "outputs": [
                    {"format": f"{t.dtype} {list(t.shape)}"} for t in manifest.model.outputs
                ],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(manifest)},
        },
    }
    if manifest.version is not None:
        found["version"] = manifest.version
    if manifest.license is not None:
        found["licenses"] = [{"expression": manifest.license}]
    return found


def _metrics(manifest: Manifest) -> list[dict[str, str]]:
    latency = manifest.latency
    doubt = ", unreliable" if latency.unreliable else ""
    where = f"{latency.device}, {latency.stamp}{doubt}, {manifest.runtime.threads} thread(s)"
    return [
        *(_metric(q) for q in (manifest.quality, manifest.test) if q is not None),
        {"type": "latency, median", "value": f"{latency.median_ms:.6g} ms", "slice": where},
        {"type": "latency, p90", "value": f"{latency.p90_ms:.6g} ms", "slice": where},
    ]


def _metric(quality: Quality) -> dict[str, str]:
    return {
        "type": quality.metric,
        "value": f"{quality.shipped:.6g}",
        "slice": f"{quality.split} split, n = {quality.n}",
    }
