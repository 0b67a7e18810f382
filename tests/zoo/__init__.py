"""Tiny models, random weights, offline: what tracing, cutting and training are proven against.

hugging_face.py  named cases with hand-written configs    plain.py, traps.py  plain modules, one difficulty each
sweep.py         every (model type, task) pair of transformers' auto classes, from shrunken default configs
"""
