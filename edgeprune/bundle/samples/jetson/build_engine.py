"""Build this bundle's TensorRT engine on its Jetson: python3 samples/jetson/build_engine.py [--sparsity].

Needs JetPack 5.1 or newer, its python3 and numpy. INT8 and mixed are built from the INT8 file and FP16 from the FP32 file, as far as the
bundle has them. Each is timed and asked the golden samples; the fastest that answers as its file does is kept beside the bundle, until
what it depends on changes. Not yet run on a Jetson.
"""

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT.with_name(ROOT.name + "-engine")  # beside the bundle, which stays as it is
LIBRARIES, MEMINFO = "*/libnvinfer.so.*", "/proc/meminfo"
sys.path.insert(0, str(ROOT / "samples" / "python"))
from predict import checked, preprocess  # noqa: E402  (a file of the same bundle)

FLAGS = {"mixed": ["--int8", "--fp16"], "int8": ["--int8"], "fp16": ["--fp16"]}  # gone in 11
TIMING = ["--warmUp=200", "--duration=3", "--iterations=10"]
AS_NEW = ["--useSpinWait", "--useCudaGraph", "--noDataTransfers"]  # what TensorRT 11 does untold
BASE_MIB, COPIES = 768, 6  # what CUDA and the builder take, and how often they copy the weights
TIMEOUT_S = 3600  # of one call
MEDIAN = r"GPU Compute Time: .*?median = ([0-9.e+-]+) ms"
UNSTABLE = r"GPU compute time is unstable, with coefficient of variance = ([0-9.]+)%"
File = collections.namedtuple("File", "path outputs limit agreement")  # a model, its golden rules


def read_files(facts):
    """The model that ships, and the same net in FP32 where the bundle has it."""
    rules, twin = json.loads(checked("golden/tolerance.json")), facts.get("float_model")
    least, outputs = rules["tolerance"]["min_argmax_agreement"], facts["golden"]["outputs"]
    found = [File(facts["model"]["path"], outputs, rules["max_abs_error"], least)]
    if twin:
        golden, rules = twin["golden"], twin["golden"]["tolerance"]
        least = rules["min_argmax_agreement"]
        found.append(File(twin["model"]["path"], golden["outputs"], rules["atol"], least))
    return found


def candidates(files, content, is_typed):
    """The file behind each precision, and what is to be said of one that is missing."""
    model, *twin = files
    if is_typed:
        why = "fp16  not built: TensorRT 11 takes its types from the file, and that is FP32"
        return {"typed": model}, why if twin else ""
    if b"QuantizeLinear" not in content:
        return {"fp16": model, "fp32": model}, ""
    found = {**({"fp16": twin[0]} if twin else {}), "mixed": model, "int8": model}
    return found, "" if twin else "fp16  not built: the bundle has no float model to build it from"


def fingerprint(built_from, contents, flags, libraries):
    """All that an engine depends on: the file behind each precision, the flags, and JetPack."""
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    onnx = {name: [file.path, digests[file.path]] for name, file in built_from.items()}
    found = {"libnvinfer": libraries, "flags": flags, "onnx": onnx}
    for name in ("/etc/nv_tegra_release", "/proc/device-tree/model"):
        found[name] = Path(name).read_text("utf-8")[:200] if os.path.exists(name) else None
    return found


def trtexec(*arguments):
    """What trtexec printed, when it passed."""
    program = shutil.which("trtexec") or "/usr/src/tensorrt/bin/trtexec"
    if not os.access(program, os.X_OK):
        sys.exit("FAIL: there is no trtexec; install it with: sudo apt install nvidia-jetpack")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": TIMEOUT_S}
    try:
        done = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, **pipes)
    except subprocess.TimeoutExpired:
        raise RuntimeError("failed: took over %d s" % TIMEOUT_S) from None
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode or "&&&& PASSED" not in text:
        errors = re.findall(r"^\[[^\]]*\] \[E\] (.*)$", text, re.MULTILINE)
        errors += ["killed, most likely for memory" if done.returncode == -9 else "no reason given"]
        reasons = re.findall(r"^\[\d+\] .*$", text, re.MULTILINE)  # under the line of its node
        raise RuntimeError("failed: " + " ".join([errors[0], *reasons[:1]]))
    return text


def answers(engine, recipe, options):
    """The engine's outputs for the golden inputs, ``float32 [n, classes]``."""
    rows, raw, out = [], engine + ".raw", engine + ".json"
    once = ["--iterations=1", "--duration=0", "--warmUp=0", "--exportOutput=" + out]
    once += ["--loadEngine=" + engine, "--loadInputs=%s:%s" % (recipe["input"]["name"], raw)]
    once += [] if AS_NEW[0] in options else ["--includeDataTransfers"]
    for sample in np.load(str(ROOT / "golden" / "inputs.npy"), allow_pickle=False):
        Path(raw).write_bytes(preprocess(sample, recipe).tobytes())
        trtexec(*once)
        rows.append(json.loads(Path(out).read_text())[0]["values"])
    return np.asarray(rows, np.float32)


def tried(precision, file, engine, recipe, options):
    """The milliseconds of a precision, or None when it cannot be built or its answers are off; says which."""
    try:
        onnx = "--onnx=%s" % (ROOT / file.path)
        text = trtexec(onnx, "--saveEngine=" + engine, *FLAGS.get(precision, ()), *options)
        median, outputs = re.search(MEDIAN, text), answers(engine, recipe, options)
        if not median:
            raise RuntimeError("printed no GPU Compute Time")
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        return print("%-5s trtexec %s" % (precision, error))
    wanted, ms = np.load(str(ROOT / file.outputs), allow_pickle=False), float(median[1])
    error, same = np.abs(outputs - wanted).max(), (outputs.argmax(1) == wanted.argmax(1)).mean()
    fine = error <= 1.001 * file.limit and same >= file.agreement
    said = (precision, ms, error, file.limit, 100 * same, "ok" if fine else "NOT OK")
    print("%-5s %.4g ms, largest error %.3g (allowed %.3g), same class %.0f%%: %s" % said)
    if (spread := re.search(UNSTABLE, text)) and float(spread[1]) > 2.5:
        print("      unstable, it varies by %s %%; lock the clocks: sudo jetson_clocks" % spread[1])
    return ms if fine else None


def main(arguments):
    """Build, time and check every precision; keep the fastest that holds."""
    recipe, facts = (json.loads(checked(n + ".json")) for n in ("preprocess", "manifest"))
    files = read_files(facts)
    contents = {file.path: checked(file.path) for file in files}
    for name in ("golden/inputs.npy", *(file.outputs for file in files)):
        checked(name)
    flags = ["--sparsity=enable"] if facts.get("sparsity") or "--sparsity" in arguments else []
    libraries = sorted(path.name for path in Path("/usr/lib").glob(LIBRARIES))
    is_typed = re.search(r"so\.1[1-9]\b", " ".join(libraries))  # types are the file's own
    built_from, missing = candidates(files, contents[files[0].path], is_typed)
    wanted = fingerprint(built_from, contents, flags, libraries)
    kept, note = PLACE / "model.engine", PLACE / "engine.json"
    known = json.loads(note.read_text()) if note.exists() and kept.exists() else {"of": None}
    if known["of"] == wanted and known["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest():
        sys.exit(print("PASS: %s, %.4g ms, built earlier" % (known["precision"], known["ms"])))
    free = int(re.search(r"MemAvailable: *(\d+)", Path(MEMINFO).read_text())[1]) >> 10
    room = free - BASE_MIB - COPIES * (max(map(len, contents.values())) >> 20)
    short = "FAIL: %d MiB of memory are missing; end other programs or add swap" % (64 - room)
    room >= 64 or sys.exit(short)
    PLACE.mkdir(exist_ok=True)
    options = [*flags, *TIMING, *([] if is_typed else AS_NEW)]
    options.append("--memPoolSize=workspace:%d" % min(1024, room))
    options.append("--timingCacheFile=%s" % (PLACE / "timing.cache"))
    print(missing, end="\n" if missing else "")
    with tempfile.TemporaryDirectory(dir=str(PLACE)) as folder:
        place = {name: os.path.join(folder, name) for name in built_from}
        ms = {p: tried(p, f, place[p], recipe, options) for p, f in built_from.items()}
        best = min((name for name in ms if ms[name]), key=ms.get, default=None)
        best or sys.exit("FAIL: no precision passed; deploy again with precisions: [fp32]")
        kept.write_bytes(made := Path(place[best]).read_bytes())
    digest, source = hashlib.sha256(made).hexdigest(), built_from[best].path
    facts = {"of": wanted, "precision": best, "onnx": source, "ms": ms[best], "sha256": digest}
    note.write_text(json.dumps(facts))
    said = (best, ms[best], source, kept)
    print("PASS: %s, %.4g ms of GPU time without copies, from %s: %s" % said)


if __name__ == "__main__":
    main(sys.argv[1:])
