"""Training that brings a pruned model's answers back to the dense one's, and the sparse patterns it keeps meanwhile."""
