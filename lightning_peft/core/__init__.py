"""The engine. It depends on torch only, not on Lightning or transformers.

Read in this order: :mod:`~lightning_peft.core.targeting` (what to adapt), :mod:`~lightning_peft.core.adapters` (what
is inserted), :mod:`~lightning_peft.core.state` (what trains and is saved), :mod:`~lightning_peft.core.injection` (how
it is inserted, merged and removed), :mod:`~lightning_peft.core.switching` (which adapters run) and
:mod:`~lightning_peft.core.batching` (mixed batches). ``class_swap`` is the mechanism below all of them.
"""
