"""Scores by key: what names them, and places that keep them and never return a wrong one."""
