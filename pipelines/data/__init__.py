"""Data sets: reading sources, the prepared data set, the training stream and its ledger."""
