"""Other tools' files: scored pairs for their trainers, samples for their judges, models for the Hub."""
