"""From kernels timed alone to the latency of any structure: width grids, tables, and a corrected model of whole nets. Pure numpy."""
