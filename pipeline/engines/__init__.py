"""vLLM and transformers behind one protocol: token ids in, log-probabilities out; and sampling."""
