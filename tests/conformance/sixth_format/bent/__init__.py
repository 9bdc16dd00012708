"""A throw-away format: one folder, and all else finds it."""
