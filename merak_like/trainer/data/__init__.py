"""From files to batches: samples, the order they come in, documents packed into rows, and batches made ahead."""
