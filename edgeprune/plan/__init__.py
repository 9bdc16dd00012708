"""Which widths a model gets: what they cost in time and accuracy, and a plan that was measured within the budget.

Everything here happens before any training: latency does not depend on what the weights are, so structures are timed with the dense
file's own leading channels.
"""
