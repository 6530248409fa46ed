"""What a training reads: stored pairs, responses and rollouts, and which of them a forward pass takes."""
