"""ONNX files that TensorRT builds its engines from."""
