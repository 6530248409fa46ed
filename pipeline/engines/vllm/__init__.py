"""The vLLM engine: starting it at the right size, what its runners and its prefix cache answer, scoring, sampling."""
