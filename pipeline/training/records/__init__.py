"""What a training writes while it runs: metrics by step, the policy's log-probabilities of single pairs, what trackers show."""
