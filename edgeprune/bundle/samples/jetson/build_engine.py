"""Build this bundle's TensorRT engine on its Jetson: python3 samples/jetson/build_engine.py [--sparsity].

Needs JetPack 5.1 or newer, its python3 and numpy. The engine is kept beside the bundle until what it depends on changes. Of the
precisions that the file allows, the fastest that passes the golden check is kept. Not yet run on a Jetson.
"""

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
UNSTABLE = r"GPU compute time is unstable, with coefficient of variance = ([0-9.]+)%"


def fingerprint(content, flags):
    """All that an engine depends on."""
    names = sorted(path.name for path in Path("/usr/lib").glob(LIBRARIES))
    found = {"libnvinfer": names, "flags": flags, "onnx": hashlib.sha256(content).hexdigest()}
    for name in ("/etc/nv_tegra_release", "/proc/device-tree/model"):
        found[name] = Path(name).read_text("utf-8")[:200] if os.path.exists(name) else None
    return found


def trtexec(*arguments):
    """What trtexec printed, when it passed."""
    program = shutil.which("trtexec") or "/usr/src/tensorrt/bin/trtexec"
    if not os.access(program, os.X_OK):
        sys.exit("FAIL: there is no trtexec; install it with: sudo apt install nvidia-jetpack")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, **pipes)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode or "&&&& PASSED" not in text:
        errors = re.findall(r"^\[[^\]]*\] \[E\] (.*)$", text, re.MULTILINE)
        errors += ["killed, most likely for memory" if done.returncode == -9 else "no reason given"]
        raise RuntimeError("failed: " + errors[0])
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


def tried(precision, engine, recipe, options):
    """The milliseconds of a precision, or None when it cannot be built or fails the golden check; says which."""
    try:
        text = trtexec("--saveEngine=" + engine, *FLAGS.get(precision, ()), *options)
        outputs = answers(engine, recipe, options)
    except RuntimeError as error:
        return print("%-5s trtexec %s" % (precision, error))
    rules = json.loads(checked("golden/tolerance.json").decode("utf-8"))
    wanted = np.load(str(ROOT / "golden" / "outputs.npy"), allow_pickle=False)
    ms = float(re.search(r"GPU Compute Time: .*?median = ([0-9.]+) ms", text)[1])
    error, same = np.abs(outputs - wanted).max(), (outputs.argmax(1) == wanted.argmax(1)).mean()
    limit, least = 1.001 * rules["max_abs_error"], rules["tolerance"]["min_argmax_agreement"]
    fine = error <= limit and same >= least
    said = (precision, ms, error, 100 * same, "ok" if fine else "NOT OK")
    print("%-5s %.4g ms, largest error %.3g, same class %.0f%%: %s" % said)
    if (spread := re.search(UNSTABLE, text)) and float(spread[1]) > 2.5:
        print("      unstable, it varies by %s %%; lock the clocks: sudo jetson_clocks" % spread[1])
    return ms if fine else None


def main(arguments):
    """Build, time and check every precision; keep the fastest that passes."""
    recipe, facts = (json.loads(checked(n + ".json")) for n in ("preprocess", "manifest"))
    *_, content = map(checked, ("golden/inputs.npy", "golden/outputs.npy", recipe["model"]))
    flags = ["--sparsity=enable"] if facts.get("sparsity") or "--sparsity" in arguments else []
    wanted, kept, note = fingerprint(content, flags), PLACE / "model.engine", PLACE / "engine.json"
    known = json.loads(note.read_text()) if note.exists() and kept.exists() else {"of": None}
    if known["of"] == wanted and known["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest():
        sys.exit(print("PASS: %s, %.4g ms, built earlier" % (known["precision"], known["ms"])))
    free = int(re.search(r"MemAvailable: *(\d+)", Path(MEMINFO).read_text())[1]) >> 10
    room = free - BASE_MIB - COPIES * (len(content) >> 20)
    short = "FAIL: %d MiB of memory are missing; end other programs or add swap" % (64 - room)
    room >= 64 or sys.exit(short)
    PLACE.mkdir(exist_ok=True)
    candidates = ("mixed", "int8") if b"QuantizeLinear" in content else ("fp16", "fp32")
    is_new = re.search(r"so\.1[1-9]\b", " ".join(wanted["libnvinfer"]))  # types are the file's own
    candidates, untold = (("typed",), []) if is_new else (candidates, AS_NEW)
    options = ["--onnx=%s" % (ROOT / recipe["model"]), *flags, *TIMING, *untold]
    options.append("--memPoolSize=workspace:%d" % min(1024, room))
    options.append("--timingCacheFile=%s" % (PLACE / "timing.cache"))
    with tempfile.TemporaryDirectory(dir=str(PLACE)) as folder:
        ms = {p: tried(p, os.path.join(folder, p), recipe, options) for p in candidates}
        best = min((name for name in candidates if ms[name]), key=ms.get, default=None)
        best or sys.exit("FAIL: no precision passed; deploy again with precisions: [fp32]")
        kept.write_bytes(made := Path(folder, best).read_bytes())
    digest = hashlib.sha256(made).hexdigest()
    note.write_text(json.dumps({"of": wanted, "precision": best, "ms": ms[best], "sha256": digest}))
    print("PASS: %s, %.4g ms of GPU time without copies, %s" % (best, ms[best], kept))


if __name__ == "__main__":
    main(sys.argv[1:])
