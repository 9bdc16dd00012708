"""How much each channel matters, by several measures."""
