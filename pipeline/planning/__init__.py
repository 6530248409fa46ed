"""Before anything is spent: what fits data, model and memory, what is wrong with the data, what it will take."""
