"""The files of an adapter directory.

Read ``files`` (read and write, with :mod:`lightning_peft.core.untrusted` as the guard), ``seal`` (digests),
``option_types``, ``snapshot`` (an adapter in memory) and ``card``.
"""
