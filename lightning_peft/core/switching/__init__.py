"""Select which adapters run: for the whole model, or for each row of a batch.

Read ``active`` first, then ``rows`` (the ``with`` block) and ``row_dispatcher`` (what a module does inside it).
``adapter_drop`` skips adapters in some blocks and is independent of the others. The switches themselves are in
:mod:`lightning_peft.core.adapters.switches`.
"""
