"""Several processes: collectives, sharded parameters, their environment."""
