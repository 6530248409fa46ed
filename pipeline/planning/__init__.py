"""What an experiment will take before it is spent: memory of training and of scoring, steps, tokens, time."""
