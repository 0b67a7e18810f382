"""Text from blocks that are hosted elsewhere: a client with the ends of a model, hosts with blocks and caches."""
