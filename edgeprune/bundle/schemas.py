"""JSON Schemas of the files in a bundle that other programs read, generated from the records that write them."""

from __future__ import annotations

from edgeprune.bundle.manifest import GoldenFile, Manifest, Recipe
from edgeprune.bundle.repro import Repro
from edgeprune.bundle.verify import VerifyReport
from edgeprune.records.base import Record
from edgeprune.records.files import to_json_text

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMAS: dict[str, type[Record]] = {
    "bundle-manifest.schema.json": Manifest,
    "bundle-preprocess.schema.json": Recipe,
    "bundle-tolerance.schema.json": GoldenFile,
    "bundle-repro.schema.json": Repro,
    "verify-report.schema.json": VerifyReport,
}


def schema_files() -> dict[str, bytes]:
    """The schemas by file name, of what the program writes.

    They state types, ranges and forms. Rules between keys, such as that paths are distinct, are checked by ``edgeprune verify`` alone.
    """
    return {
        name: to_json_text({"$schema": DIALECT, **record.model_json_schema(mode="serialization")})
        for name, record in SCHEMAS.items()
    }
