"""What is in a file of the throw-away format."""

from edgeprune.formats.onnx.reader import anatomy, outside, weights

__all__ = ["anatomy", "outside", "weights"]
