"""The stream: from webdataset shards to `Batch`, exact and elastic; the synthetic corpus and the importers.

Read in this order: `tar` (one shard's index), `manifest` (all shards), `lanes` (the order), `loader` (samples to
arrays), `stream` (batches with their state).
"""
