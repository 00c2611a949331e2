"""Handle mixed batches: find the rows in tensors, and run several adapters in one forward.

Read ``layout`` (which dimension holds the rows), then ``batched`` (several adapters of one type share one run of the
host) and ``split`` (the fallback, which runs a module once per group of rows).
"""
