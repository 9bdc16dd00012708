"""Bundles: the folder (and zip) that an app ships, written, verified and loaded."""
