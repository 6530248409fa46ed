"""Rows as objects from files of six kinds, folders and pipes; what is broken or not what it seems says what to run."""
