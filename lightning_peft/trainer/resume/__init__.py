"""Exact resume.

Read ``rng_state`` (random number generators), ``dataloaders`` (the position in the data) and ``rng_recording`` (what a
loader draws from).
"""
