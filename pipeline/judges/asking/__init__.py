"""What a judge that is a model is asked, and what its reply says."""
