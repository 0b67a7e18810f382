"""The training loop people use, on top of the engine: settings, data, schedules, metrics, checkpoints, callbacks."""
