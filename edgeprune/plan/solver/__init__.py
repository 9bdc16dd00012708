"""The widths that lose the least within a limit, found over tables of costs and times."""
