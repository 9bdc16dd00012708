"""The pruners that are compared: each turns a knob into a structure and its kept weights; see :mod:`methods.candidate`."""
