"""Ray: connecting, what a job needs of it, actors, notices that a machine will be taken."""
