"""What several formats need: file encodings, samples and ranges, and which dimensions of a file follow which channels."""
