"""Explain whole data sets: images decoded ahead, maps written behind as parquet shards, in any number of processes."""
