"""Which widths a model gets: what they cost in time and accuracy, and a plan that was measured within the budget."""
