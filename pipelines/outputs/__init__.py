"""Bulk outputs: shards computed on actors, the manifest that commits them, one attempt of a job on one."""
