"""Where keys stand in a store's shards, in files that can be made again: sorted, in checked pages, each with a filter."""
