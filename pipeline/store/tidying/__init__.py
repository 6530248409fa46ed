"""What a store holds, what of it may go, and making few large shards of many small ones."""
