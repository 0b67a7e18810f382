"""Methods that save memory, bytes or steps, as parts that plug into an engine."""
