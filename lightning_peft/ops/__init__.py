"""Autograd functions, each with a plain reference implementation.

Read ``recompute`` first, then ``dropout``, which uses it; ``dense_gradient`` and ``finite`` are independent.
"""
