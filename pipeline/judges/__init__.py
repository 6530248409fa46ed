"""Which of two responses is better: rules, models here, models behind a server, reward models."""
