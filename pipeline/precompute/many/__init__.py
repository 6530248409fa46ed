"""Several engines on what one plan lacks: a job in a place that all of them reach, in groups that each scores and publishes."""
