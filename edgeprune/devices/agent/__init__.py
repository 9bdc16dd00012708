"""The program that runs on the board, and its bytes for pushing it there."""

from __future__ import annotations

from pathlib import Path

AGENT_PATH = Path(__file__).with_name("agent.py")
