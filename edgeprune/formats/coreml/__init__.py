"""Core ML packages for iPhone and Mac."""
