"""A step of a whole job in one process: the engine's own code, on tensors without data, all its calls heard."""
