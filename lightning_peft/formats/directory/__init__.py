"""The files of an adapter directory, which may come from anybody.

Read ``files`` (read and write safely, with :mod:`lightning_peft.core.untrusted`), ``seal`` (digests that detect
damage), ``option_types`` (types of options), ``snapshot`` (an adapter in memory, ready to write) and ``card`` (README).
"""
