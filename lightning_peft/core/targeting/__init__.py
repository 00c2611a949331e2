"""Decide what to adapt: find the base model, resolve target patterns, and describe the places where adapters attach.

Read ``base_modules``, ``base_model``, ``patterns``, ``layouts`` (how a weight becomes a matrix) and ``sites`` (weights
matched by patterns) first. ``blocks``, ``activation_sites``, ``attention_sites`` and ``token_modules`` serve the other
families, ``sublayer_weights`` finds weights by their role, and ``ties`` handles shared weights. ``frozen_parts``,
``output_head`` (which runs a ``trial_forward``) and ``storage`` decide what is left out.
"""
