"""Preference data as people have it, to pairs of token ids on disk; nothing is dropped without a reason."""
