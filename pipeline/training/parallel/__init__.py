"""Training over many processes: who reads which pairs, weights in shards (FSDP2), and their state gathered and spread again."""
