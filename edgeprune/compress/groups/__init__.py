"""Which channels of a model go together, and how they are taken out of it."""
