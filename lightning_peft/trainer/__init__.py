"""What touches the Trainer: the life of a run, its checkpoints, checks, parameter groups and logs.

Read ``install``, ``module`` (what the user's module gains), ``lifecycle`` (what happens when) and ``strategy``, then
``brought_along`` (modules with adapters of their own), ``audit``, ``param_groups``, ``averaging`` and ``logs``;
``checkpoints`` and ``resume`` are rooms of their own.
"""
