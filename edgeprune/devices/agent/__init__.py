"""The program that runs on the board: standard library only, Python 3.8 or newer, packed by :mod:`edgeprune.devices.link.agent_file`."""
