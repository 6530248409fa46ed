"""Other tools' files, both ways: scored pairs for their trainers, samples for their judges, scores that they computed."""
