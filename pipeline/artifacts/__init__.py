"""The files of a run: their tables, how they are written whole, their digests, the run's directory."""
