"""Exact resume: a run that stops and continues sees the same batches and random numbers as one that does not stop.

Read ``rng_state`` (save and restore random number generators), then ``rng_recording`` (record the states that a loader
draws from), then ``loader_source`` and ``dataloaders`` (continue inside an epoch).
"""
