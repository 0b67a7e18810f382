"""A step of a whole job in one process: the engine's own code on tensors without data, all calls between ranks heard."""
