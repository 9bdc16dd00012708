"""Times that can be compared: models side by side in the same rounds, on one board or on several."""
