"""The engine, in torch alone: no Lightning, no transformers.

Read in this order: :mod:`~lightning_peft.core.targeting` (what to adapt), :mod:`~lightning_peft.core.adapters` (what
goes in), :mod:`~lightning_peft.core.state` (what trains and is saved), :mod:`~lightning_peft.core.injection` (how it
goes in and comes out), :mod:`~lightning_peft.core.switching` (which adapters run) and
:mod:`~lightning_peft.core.batching` (what a mixed batch looks like).
"""
