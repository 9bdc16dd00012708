"""ExecuTorch programs for phones."""
