"""Insert adapters into a model, and merge, remove or reset them.

Read ``apply`` (plan, check, commit), ``rollback`` (undo a failed change), ``attach``, ``widen_record`` (from a
submodule to the module around it) and ``overrides`` (an adapter's own values of base parameters) first. Then read
``merge_plan``, ``merge``, ``low_rank_factors``, ``remove``, ``reset`` and ``remove_reparameterization``. ``checks``,
``check_forward``, ``saving_trial`` and ``saving_base`` detect problems early.
"""
