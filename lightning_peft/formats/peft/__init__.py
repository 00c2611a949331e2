"""To and from Hugging Face PEFT's format.

Read ``converter`` (the base class), ``layers`` and ``targets`` (names), ``common_options``, ``base_values`` and
``trainable_tokens``; ``families`` has one converter for each kind of adapter.
"""
