"""Stage two: the policy learns from pairs.parquet alone. Imports neither engines nor the store."""
