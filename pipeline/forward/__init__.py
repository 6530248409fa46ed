"""Log-probabilities of the branches of packed trees under any causal model. Knows neither configuration nor files."""
