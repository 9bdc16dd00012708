"""The whole way to a board and back, on a real arm64 system under emulation: files, runtimes and numerics are real, times mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from build_board import HOME, PROCESSORS, board_folder, in_root
from bundle_fixture import facts
from emulated_board import PYTHONS, workdir
from example_files import ExampleFiles

from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.cli import main as cli
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link.agent_file import PACKAGE, agent_bytes, agent_name
from edgeprune.devices.link.transports import open_transport
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.measure import ModelFile, measure
from edgeprune.errors import DeviceError
from edgeprune.records.device import Device

# The first use builds the board: minutes, once.
pytestmark = [pytest.mark.board, pytest.mark.timeout(1800)]
HOST_RUNTIMES = {"tflite": "litert", "onnx": "onnxruntime"}
MAX_STEPS = 2
LIST_OPERATORS = """
import importlib, sys
interpreter = importlib.import_module(sys.argv[1]).Interpreter(model_path=sys.argv[2], num_threads=1)
interpreter.allocate_tensors()
print(*(op["op_name"] for op in interpreter._get_ops_details()))
"""
Opener = Callable[..., Board]


@pytest.fixture(scope="module")
def board(arm64_board: Device) -> Iterator[Opener]:
    """The board with the Python that has a runtime, on a named processor or the usual one; each is opened once."""
    with ExitStack() as opened:
        boards: dict[str, Board] = {}

        def get(runtime: str, processor: str = "") -> Board:
            python = PYTHONS[runtime] + (f"-{processor}" if processor else "")
            if python not in boards:
                device = arm64_board.model_copy(update={"python": python})
                boards[python] = opened.enter_context(
                    open_board("emulated", device, exclusive=False)
                )
            return boards[python]

        yield get


def answers(
    board: Board, files: ExampleFiles, kind: tuple[str, str], runtime: str, *, delegate: bool = True
) -> np.ndarray:
    """Outputs of a file on a board: ``float32 [32, 10]``, of fp32 files the first 8 rows, because emulated floats are slow."""
    content = files.path(*kind).read_bytes()
    board.load("net", content, runtime=runtime, threads=1, delegate=delegate)
    try:
        return board.infer("net", files.inputs(kind[0])[: None if kind[1] == "int8" else 8])
    finally:
        board.unload(["net"])


def test_the_board_says_that_it_is_an_emulated_arm64(board):
    facts = board("litert").hello()
    assert facts["machine"] == "aarch64"
    assert facts["python"] == "3.11.2"
    assert facts["emulated"] is True


def test_emulation_is_found_where_the_processor_looks_like_that_of_a_board(
    board, arm64_board, tmp_path
):
    board("litert")  # pushes the agent
    root = board_folder() / "root"
    agent = workdir() / agent_name()
    tmp_path.joinpath("cpuinfo").write_text(
        "processor : 0\nFeatures : fp asimd crc32\n\nModel : Pi\n"
    )
    text = f"import sys; sys.path.insert(0, sys.argv[1]); import {PACKAGE}.machine as m; print(m.machine_facts())"
    argv = ["/usr/bin/python3", "-c", text, f"/{agent.relative_to(root)}"]
    shown = in_root(root, argv, 60, cpuinfo=tmp_path / "cpuinfo")
    assert "'cpu_model': 'Pi'" in shown
    assert "'emulated': True" in shown


def test_an_emulated_board_is_stamped_so_even_when_it_stands_in(board, arm64_board):
    assert board("litert").fingerprint("litert", 1).stamp == "emulated"
    stand_in = arm64_board.model_copy(update={"stand_in": True})
    with open_board("emulated", stand_in, exclusive=False) as opened:
        assert opened.fingerprint("litert", 1).stamp == "emulated"


def test_the_agent_is_pushed_whole_and_private_over_ssh(board):
    board("litert")
    folder = workdir()
    assert (folder / agent_name()).read_bytes() == agent_bytes()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("runtime", "version"),
    [("litert", "2.3.0"), ("tflite-runtime", "2.14.0"), ("onnxruntime", "1.32.0")],
)
def test_the_arm64_wheels_of_every_runtime_import(board, runtime, version):
    assert board(runtime).runtime_version(runtime) == version


def test_a_python_without_the_runtime_is_an_error_that_says_what_to_install(arm64_board):
    device = arm64_board.model_copy(update={"python": "/usr/bin/python3"})
    with (
        open_board("emulated", device, exclusive=False) as opened,
        pytest.raises(DeviceError, match="pip install ai-edge-litert"),
    ):
        opened.runtime_version("litert")


# tflite-runtime 2.14 gives XNNPACK no INT8 operator unless it is asked to.
@pytest.mark.parametrize(
    ("runtime", "precision", "delegated"),
    [
        ("litert", "int8", True),
        ("litert", "fp32", True),
        ("tflite-runtime", "int8", False),
        ("tflite-runtime", "fp32", True),
    ],
)
def test_xnnpack_runs_on_the_board(arm64_board, files, runtime, precision, delegated):
    place = f"/{HOME}/{precision}.tflite"
    transport = open_transport(arm64_board)
    try:
        transport.put(files.path("tflite", precision).read_bytes(), place)
        module = f"{'ai_edge_litert' if runtime == 'litert' else 'tflite_runtime'}.interpreter"
        argv = [PYTHONS[runtime], "-c", LIST_OPERATORS, module, place]
        done = transport.run(argv, timeout_s=60)
    finally:
        transport.close()
    assert done.code == 0, done
    operators = done.stdout.decode().split()
    assert ("DELEGATE" in operators) is delegated


@pytest.mark.parametrize(
    ("runtime", "processor", "delegate"),
    [
        *(("litert", processor, True) for processor in PROCESSORS),
        ("litert", "cortex-a72", False),
        ("tflite-runtime", "cortex-a53", True),
    ],
)
def test_an_int8_tflite_file_answers_on_every_processor_as_on_the_host(
    board, host, files, runtime, delegate, processor
):
    kind = ("tflite", "int8")
    # XNNPACK and the built-in kernels round differently: each is compared with its own on the host.
    same_kernels = delegate and runtime == "litert"
    expected = answers(host, files, kind, "litert", delegate=same_kernels)
    found = answers(board(runtime, processor), files, kind, runtime, delegate=delegate)
    steps = np.abs(found - expected).max() / files.step(*kind, expected)
    assert steps <= MAX_STEPS * 1.001
    assert (found.argmax(1) == files.y).mean() >= 0.8


@pytest.mark.parametrize("delegate", [True, False], ids=["default", "built-in"])
@pytest.mark.parametrize("runtime", ["litert", "tflite-runtime"])
def test_an_fp32_tflite_file_answers_on_the_board_as_on_the_host(
    board, host, files, runtime, delegate
):
    kind = ("tflite", "fp32")
    expected = answers(host, files, kind, "litert")
    found = answers(board(runtime), files, kind, runtime, delegate=delegate)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_an_onnx_file_answers_on_the_board_as_it_should(board, files, precision):
    kind = ("onnx", precision)
    found = answers(board("onnxruntime"), files, kind, "onnxruntime")
    expected = files.unfused(precision)[: len(found)]
    limit = MAX_STEPS * files.step(*kind, expected) * 1.001
    if precision == "fp32":
        limit = 1e-4 * float(np.abs(expected).max())
    assert np.abs(found - expected).max() <= limit
    assert (found.argmax(1) == files.y[: len(found)]).mean() >= 0.8


def test_times_of_an_emulated_board_are_stamped_emulated(arm64_board, files):
    artifact = files.artifacts["tflite", "int8"]
    content = files.path("tflite", "int8").read_bytes()
    model = ModelFile("net", content, "int8", artifact.sha256)
    plan = TimingPlan(rounds=2, block_ms=1, min_runs=2, max_runs=2, warmup_ms=1)
    with open_board("emulated", arm64_board) as board:
        (found,) = measure(board, [model], runtime="litert", threads=1, plan=plan)
    assert found.stamp == "emulated"
    assert 4 <= len(found.samples_ns()) <= 6  # disturbed rounds were added to


def bundle_of(
    files: ExampleFiles, host: Board, kind: tuple[str, str], runtime: str, folder: Path
) -> Path:
    """A bundle of one of the files, its golden answers made on the host."""
    stated = facts(runtime, preprocess=files.preprocess, labels=files.labels)
    payload = Payload(
        model=files.artifacts[kind],
        model_file=files.path(*kind),
        golden_inputs=files.raw[:8],
        golden_outputs=answers(host, files, kind, HOST_RUNTIMES[kind[0]])[:8],
    )
    return write_bundle(folder, stated, payload)


@pytest.mark.parametrize(
    ("form", "precision", "runtime"),
    [
        ("tflite", "int8", "litert"),
        ("tflite", "int8", "tflite-runtime"),
        (
            "onnx",
            "fp32",
            "onnxruntime",
        ),  # INT8 differs on a host without VNNI, so level 4 or 5 fails
    ],
)
def test_a_bundle_made_on_the_host_passes_verify_on_the_board(
    project, files, host, capsys, form, precision, runtime
):
    bundle = bundle_of(files, host, (form, precision), runtime, project / "net.epb")
    cli.main(["verify", str(bundle), "--device", runtime])  # ends the program when a level fails
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith(f"L5 golden on {runtime}"))
    assert "passed" in lines[at]
    (latency,) = (line for line in lines[at:] if "- latency" in line)
    assert "not-run" in latency
    assert "are emulated" in latency


@pytest.mark.parametrize(
    ("form", "precision", "runtime"),
    [
        ("tflite", "int8", "litert"),
        ("tflite", "int8", "tflite-runtime"),
        (
            "onnx",
            "fp32",
            "onnxruntime",
        ),  # INT8 differs on a host without VNNI, so level 4 or 5 fails
    ],
)
def test_the_sample_of_a_bundle_passes_its_own_check_on_the_board(
    tmp_path, arm64_board, files, host, form, precision, runtime
):
    bundle = bundle_of(files, host, (form, precision), runtime, tmp_path / "net.epb")
    place = f"/{HOME}/{runtime}"
    transport = open_transport(arm64_board)
    try:
        for path in filter(Path.is_file, bundle.rglob("*")):
            transport.put(path.read_bytes(), f"{place}/{path.relative_to(bundle)}")
        sample = f"{place}/samples/python/predict.py"
        done = transport.run([PYTHONS[runtime], sample, "--check"], timeout_s=120)
    finally:
        transport.close()
    assert done.code == 0, done
    assert done.stdout.startswith(b"PASS")
