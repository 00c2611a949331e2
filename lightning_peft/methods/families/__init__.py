"""The base classes of methods, one family each.

Read ``method`` (every method is this callback) and ``arguments``, then ``weight`` and ``ranked``, ``activation``,
``selection``, ``sequence`` and ``prompt_adapters``.
"""
