"""Weights made fit for 8 bits before a file is quantised: equalised, trained with rounding, lifted where they are too faint."""
