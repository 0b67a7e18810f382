"""Sharded execution: a fine trace's own code with local sizes and explicit collectives between its steps."""
