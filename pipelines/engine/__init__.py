"""The engine of every bulk job: shards computed by actors, committed by one manifest."""
