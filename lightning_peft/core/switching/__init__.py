"""Which adapters run: for the whole model, or for each row of a batch.

Read ``active``, then ``rows`` (the ``with`` block) and ``row_dispatcher`` (what a module does inside it);
``adapter_drop`` stands alone.
"""
