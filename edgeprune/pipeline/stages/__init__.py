"""The stages of a run, from the checks that need no board to the report and the bundle."""
