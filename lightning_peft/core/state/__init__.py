"""Decide what trains and what is saved.

Read ``plan`` (what a method will do) and ``report`` (the table for users) first; :mod:`lightning_peft.core.record` has
what was done. Then read ``state_dict``, ``adapter_records``, ``moved_values`` (frozen values that change),
``consistency`` (record against model), ``fingerprint`` and ``freezing``, and for files ``digest``, ``torch_file`` and
``torch_zip``.
"""
