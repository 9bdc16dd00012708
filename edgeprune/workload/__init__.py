"""The user's model and data, loaded and checked against each other."""
