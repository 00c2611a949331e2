"""The adapter base classes, and the stack that runs adapters on a module.

Read ``base``, ``stack`` (the swapped forward), ``switches`` (which adapters run), ``effective_weights`` (adapted
values of parameters), ``reads`` (who gets these values) and ``lookup`` first. Then read ``low_rank``, ``activation``,
``attention_prefix`` (adds keys and values to attention calls), ``virtual_tokens`` and ``replaced_forward``.
"""
