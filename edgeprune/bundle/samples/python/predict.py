"""Run this bundle's model: needs Python 3.8+, numpy and the runtime that README.md names, nothing else.

python predict.py --check       run the golden samples: prints PASS or FAIL, exit code 0 or 1
python predict.py FILE          the three best classes of an image (needs Pillow) or of one raw sample (.npy)
"""

import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def checked(name):
    """The bytes of a file of the bundle, once they match SHA256SUMS."""
    lines = (ROOT / "SHA256SUMS").read_text("utf-8").splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    content = (ROOT / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != sums.get(name):
        sys.exit("FAIL: %s is not what SHA256SUMS says; copy the bundle again" % name)
    return content


def preprocess(raw, recipe):
    """One raw sample as the file wants it: float32 [1, ...] in the file's layout."""
    constants = recipe["preprocess"]
    x = np.asarray(raw)
    if constants["kind"] == "image" and x.dtype == np.uint8:
        x = x[..., None] if x.ndim == 2 else x
        mean, std = (np.asarray(constants[key], np.float32) for key in ("mean", "std"))
        x = (x.astype(np.float32) / np.float32(255) - mean) / std  # [H, W, C]
        x = x.transpose(2, 0, 1)
    x = x.astype(np.float32)
    if recipe["input"]["layout"] == "NHWC" and x.ndim == 3:
        x = x.transpose(1, 2, 0)
    shape = recipe["input"]["shape"][1:]
    if list(x.shape) != shape:
        sys.exit("FAIL: a sample must become %s, but is %s" % (shape, list(x.shape)))
    return np.ascontiguousarray(x[None])


def load_onnx(content, threads):
    """A function from one input to one output, run by onnxruntime."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports by default
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def load_tflite(content, threads):
    """A function from one input to one output, run by LiteRT or by the older tflite_runtime."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(x):
        scale, zero = source["quantization"]
        if scale:
            limits = np.iinfo(source["dtype"])
            x = np.clip(np.rint(x / scale) + zero, limits.min, limits.max).astype(source["dtype"])
        interpreter.set_tensor(source["index"], x)
        interpreter.invoke()
        y = interpreter.get_tensor(result["index"])
        scale, zero = result["quantization"]
        return (y.astype(np.float32) - zero) * np.float32(scale) if scale else y

    return run


def load_executorch(content, threads):
    """A function from one input to one output, run by ExecuTorch for Python, which needs torch."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(content).load_method("forward")
    return lambda x: method.execute([torch.from_numpy(x)])[0].numpy()


def read_sample(path, recipe):
    """A raw sample from a .npy file or an image file."""
    if path.endswith(".npy"):
        return np.load(path, allow_pickle=False)
    from PIL import Image

    shape = recipe["input"]["shape"]
    height, width = shape[1:3] if recipe["input"]["layout"] == "NHWC" else shape[2:4]
    mode = "L" if recipe["preprocess"]["color"] == "grey" else "RGB"
    return np.asarray(Image.open(path).convert(mode).resize((width, height), Image.BILINEAR))


def main(argument):
    """Check the golden samples, or classify one file."""
    recipe = json.loads(checked("preprocess.json").decode("utf-8"))
    loaders = {".onnx": load_onnx, ".tflite": load_tflite, ".pte": load_executorch}
    load = loaders.get(Path(recipe["model"]).suffix) or sys.exit(
        "FAIL: this file runs in an app only"
    )
    run = load(checked(recipe["model"]), recipe["runtime"]["threads"])
    if argument == "--check":
        rules = json.loads(checked("golden/tolerance.json").decode("utf-8"))
        files = (io.BytesIO(checked("golden/%s.npy" % name)) for name in ("inputs", "outputs"))
        inputs, golden = (np.load(file, allow_pickle=False) for file in files)
        outputs = np.concatenate([run(preprocess(raw, recipe)) for raw in inputs])
        error = float(np.abs(outputs - golden).max())
        same = float((outputs.argmax(1) == golden.argmax(1)).mean())
        close = error <= rules["max_abs_error"] * 1.001  # room for float32 rounding
        ok = close and same >= rules["tolerance"]["min_argmax_agreement"]
        text = "%s, largest error %.3g, same class %.0f%%"
        print(text % ("PASS" if ok else "FAIL", error, 100 * same))
        return 0 if ok else 1
    Path(argument).is_file() or sys.exit("FAIL: there is no file %s" % argument)
    labels = checked("labels.txt").decode("utf-8").splitlines()
    scores = run(preprocess(read_sample(argument, recipe), recipe))[0]
    for index in np.argsort(-scores)[:3]:
        print("%-30s %.4f" % (labels[index], scores[index]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
