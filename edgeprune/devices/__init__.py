"""Boards: how to reach them, and how to time a model on them so that a small difference can be trusted."""
