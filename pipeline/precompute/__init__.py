"""Stage one: what an experiment needs of its reference, scoring what the store lacks, pairs.parquet."""
