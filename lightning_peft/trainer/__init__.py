"""Everything that uses the Trainer: hooks of a run, checkpoints, checks, optimizers and logs.

Read ``prepare_run`` (entry point), ``module`` (mixin of the user's module), ``lifecycle`` (order of hooks) and
``strategy`` (saving, loading, data), then ``optimizers`` and ``param_groups``, ``audit``, ``audit_ranks`` and
``zero_gradients`` (checks), ``checkpoints`` and ``resume``, ``logs``, and last ``brought_along`` (adapters without a
method) and the small files.
"""
