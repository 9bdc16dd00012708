"""ONNX files for onnxruntime, written, quantised, cut and read."""
