"""Lightning checkpoints: what goes into them besides tensors, and how sharded ones are written and read.

Read ``trimming`` (only trainable state is saved), ``manifest`` (the methods that made the file), ``hyperparameters``
and ``unsafe_hparams`` (arguments of the module), then ``sharded`` and ``distributed_files``.
"""
