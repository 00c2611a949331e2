"""What goes in: the adapter base classes and the stack that runs them on a module.

Read ``base``, ``stack`` (the swapped forward), ``switches`` (which adapters run), ``effective_weights``, ``reads``
(adapted values for code that reads a parameter) and ``lookup``, then ``low_rank``, ``activation``,
``attention_prefix`` (attention calls get more keys and values), ``virtual_tokens`` and ``replaced_forward``.
"""
