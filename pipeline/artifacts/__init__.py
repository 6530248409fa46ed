"""Files: the tables of a run, writing any file whole or leaving nothing behind, digests, the directory of a run."""
