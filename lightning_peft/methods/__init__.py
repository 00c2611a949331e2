"""The methods, one file each: the source and formula, the arguments, the adapter.

The base classes are in :mod:`~lightning_peft.methods.families`, what several methods use in
:mod:`~lightning_peft.methods.shared`. ``combine`` makes new adapters from others.
"""
