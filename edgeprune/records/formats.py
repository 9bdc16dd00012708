"""What is known of every format without its toolchain: ``facts.yaml`` in the folder of each, and the runtimes that run its files."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError

from edgeprune.records.base import Record, read_yaml

FACTS = "facts.yaml"
# What a file stores: in the "fp32" place of a target for Apple devices stands a file in half precision.
FilePrecision = Literal["fp32", "fp16", "int8"]
# What the agent on a board can run; each needs an engine in :mod:`edgeprune.devices.agent`.
RuntimeName = Literal["litert", "tflite-runtime", "onnxruntime", "tensorrt", "executorch", "coreml"]


class RuntimeFacts(Record):
    """Facts about a runtime of a format.

    ``stand_in`` runs in its place on this machine, where it cannot run here. ``install`` is what ``pip install`` is told, and ``purl`` how
    a package manager names it; ``""`` where there is no such package. ``sparse_kernels``: it is faster where weights are 2:4 sparse.
    ``of_system``: it comes with the board's own system. ``wheels``: edgeprune puts it on boards.
    """

    stand_in: RuntimeName | None = None
    install: str = ""
    purl: str = ""
    sparse_kernels: bool = False
    of_system: bool = False
    wheels: bool = True


class ReadmeFacts(Record):
    """What a bundle's README says of a format, where that is not what it says of every other.

    ``run`` says how to run the model, with ``{name}`` of the bundle, path of the ``{model}`` and what is ``{built}`` of it, by ``builds``;
    ``elsewhere`` leads to how a stand-in of the runtime runs it.
    ``own_texts`` are what the file says of itself.
    """

    run: str = ""
    builds: dict[Literal["both", "int8", "fp32"], str] = {}
    elsewhere: str = ""
    own_texts: str = "The model file itself carries no texts."


class FormatFacts(Record):
    """Facts about a format: its file suffix, the runtimes that can run it, and the extra that installs its toolchain.

    A file of some formats cannot be cut to other widths in place. ``twin`` names the format with the same kernels whose files are cut and
    timed in its place; the model itself is converted anew for every structure (:class:`edgeprune.pipeline.files.reconverted.Converted`).
    Without a twin it is ``""``. ``system`` is the only kind of computer that runs its files, in words (``Mac``).
    ``built_in_kernels`` says whether a file can also be run without the fast kernels, to compare the two.
    ``int8_options`` says whether INT8 files can have other ranges than the format's own, and layers in float.
    ``layout`` is that of image inputs inside the file. ``tools`` are the packages that write, read and try its files on this computer.
    ``read_as`` names the format that its files are of, where that is another. ``order`` is its place in lists that people read.

    ``float_precision`` is what the file in the place of ``fp32`` stores. ``half_engines``: the board builds its own program from a file,
    in half precision where that is float; then an FP32 file goes beside an INT8 one. ``stand_in_computes`` says what a stand-in of its
    runtime does otherwise. ``counts_delegate``: the conversion fixes which operations the fast kernels run, and the record counts them.
    ``built_in_may_refuse``: the built-in kernels do not take every file. ``compute_units``: an app chooses among kinds of processors.
    ``sentinel`` is the digest of the small net in its folder that is timed before and after the real ones, ``""`` where there is none.
    ``samples`` are the folders of sample programs that a bundle takes, ``target`` that of its target. ``own_texts`` says why the texts in
    a file are not compared with its manifest.
    """

    name: str
    suffix: Annotated[str, Field(pattern=r"^\.[a-z]+$")]
    runtimes: Annotated[dict[RuntimeName, RuntimeFacts], Field(min_length=1)]
    extra: str
    layout: Literal["NHWC", "NCHW"]
    order: int = 100
    tools: tuple[str, ...] = ()
    twin: str = ""
    system: str = ""
    built_in_kernels: bool = True
    int8_options: bool = True
    read_as: str = ""
    float_precision: FilePrecision = "fp32"
    sentinel: str = ""
    half_engines: bool = False
    stand_in_computes: str = ""
    counts_delegate: bool = False
    built_in_may_refuse: bool = False
    compute_units: bool = False
    samples: tuple[str, ...] = ("python", "cpp", "target")
    own_texts: str = "the model file carries no texts"
    readme: ReadmeFacts = ReadmeFacts()

    @property
    def kind(self) -> str:
        """The format whose reader reads its files."""
        return self.read_as or self.name

    def runs_in(self) -> tuple[RuntimeName, ...]:
        """Every runtime that runs its files, on a board or in place of one that cannot run here."""
        others = (found.stand_in for found in self.runtimes.values())
        return tuple(dict.fromkeys([*self.runtimes, *(name for name in others if name)]))


def folders() -> dict[str, Path]:
    """The folder of every format, by its name; none is imported."""
    return _folders_in(tuple(_roots()))


def format_names() -> list[str]:
    """The names of all formats, in the order of lists that people read."""
    return sorted(folders(), key=lambda name: (format_facts(name).order, name))


def format_facts(name: str) -> FormatFacts:
    """The facts of a format.

    Raises:
        KeyError: there is no format of that name.
    """
    return _read(folders()[name] / FACTS)


def all_facts() -> Iterator[FormatFacts]:
    """The facts of every format, in the order of :func:`format_names`."""
    return map(format_facts, format_names())


def runtime_facts(runtime: str) -> RuntimeFacts:
    """The facts of a runtime; without any where no format names it."""
    pairs = (pair for facts in all_facts() for pair in facts.runtimes.items())
    return next((found for name, found in pairs if name == runtime), RuntimeFacts())


def stand_in(runtime: str) -> RuntimeName | None:
    """What runs the files of a runtime on this machine, where the runtime itself cannot run here."""
    return runtime_facts(runtime).stand_in


def _roots() -> list[Path]:
    spec = importlib.util.find_spec("edgeprune.formats")
    assert spec is not None
    return [Path(root) for root in spec.submodule_search_locations or ()]


@functools.cache
def _folders_in(roots: tuple[Path, ...]) -> dict[str, Path]:
    """A name is looked up here and never joined to a path: manifests and targets of strangers have names, too."""
    return {path.parent.name: path.parent for root in roots for path in root.glob(f"*/{FACTS}")}


@functools.cache
def _read(path: Path) -> FormatFacts:
    return read_yaml(FormatFacts, path)


def _known(name: str) -> str:
    if name not in folders():
        raise PydanticCustomError("literal_error", "Input should be {expected}", _expected())
    return name


def _expected() -> dict[str, Any]:
    *others, last = map(repr, format_names())
    return {"expected": f"{', '.join(others)} or {last}"}


class _OneOfThem:
    """In a JSON schema, the names of the formats that there are."""

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": format_names(), "type": "string"}


FormatName = Annotated[str, AfterValidator(_known), _OneOfThem()]
