"""What may be asked for: every field of an experiment, its limits, its files. Imports no torch."""
