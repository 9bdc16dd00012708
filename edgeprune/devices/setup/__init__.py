"""A board made ready: which runtimes it has and lacks, where their wheels come from, and whether they run."""
