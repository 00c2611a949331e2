"""What to adapt: the base model inside a module, target patterns, and the places where adapters attach.

Read ``base_modules``, ``base_model``, ``patterns``, ``layouts`` (a weight as a matrix) and ``sites`` (the weights that
patterns name), then ``blocks``, ``activation_sites``, ``attention_sites`` and ``token_modules`` for the other families.
``ties`` has the weights and modules with several names. Left alone are ``frozen_parts``, the ``output_head`` (found by
a ``trial_forward``) and what ``storage`` refuses.
"""
