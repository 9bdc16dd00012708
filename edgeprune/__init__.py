"""edgeprune: a trained PyTorch model, your data and a millisecond budget in; a verified bundle for your board out."""

from __future__ import annotations

__version__ = "0.1.0"
