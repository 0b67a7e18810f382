"""Split fine-tuning: what is done to a model so that one half of it can be trained far away."""
