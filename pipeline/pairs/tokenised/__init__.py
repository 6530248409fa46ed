"""Rows to token ids once: in processes, kept in a cache, and which of them are kept; memory holds a few numbers per row."""
