"""refscore's library: what the stages are made of. It reads no command line and prints nothing."""

__version__ = "0.1.0"
