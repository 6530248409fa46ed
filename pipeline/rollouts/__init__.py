"""Samples of the training prompts, their rewards and log-probabilities, part by part: rollouts.parquet."""
