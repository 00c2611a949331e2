"""The base classes of the methods, one per family.

Read ``method`` (every method is this callback) and ``arguments``, then ``weight`` and ``ranked``, ``activation``,
``selection``, ``sequence`` and ``prompt_adapters``.
"""
