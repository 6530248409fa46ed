"""The vLLM engine: starting it at the right size, scoring with it, sampling from it."""
