"""Plain data on disk: what people write, what the program writes, and the catalog that finds it."""
