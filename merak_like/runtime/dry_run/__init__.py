"""A step of a whole job in one process: the engine's own code on tensors without data, every call between ranks heard."""
