"""Lightning checkpoints.

Read ``manifest``, ``written`` (what the user's hooks left of the state), ``hyperparameters`` and ``apart``
(arguments of the module), then ``sharded`` and ``distributed_files``.
"""
