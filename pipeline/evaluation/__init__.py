"""Stage three: samples, KL, judgements, and figures that say how sure they are."""
