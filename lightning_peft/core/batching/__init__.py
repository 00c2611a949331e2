"""What a batch of mixed rows looks like, and how one forward serves several adapters.

Read ``layout`` (where the rows are in a tensor), ``split`` and ``batched`` (several adapters in one forward).
"""
