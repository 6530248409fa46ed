"""From a model's name to a directory, a tokenizer, a model, and digests of what it is."""
