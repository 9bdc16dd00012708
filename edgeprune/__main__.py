"""``python -m edgeprune``."""

from __future__ import annotations

from edgeprune.cli.main import main

if __name__ == "__main__":
    main()
