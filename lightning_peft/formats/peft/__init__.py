"""Conversion to and from Hugging Face PEFT's format.

Read ``converter`` (the base class), ``layers`` (the base class for weight methods), ``targets`` and ``patterns``
(names of modules), ``common_options`` and ``base_values`` (written for every method), then one converter in
``families``. ``option_table``, ``trainable_tokens`` and ``older_layouts`` serve single converters.
"""
