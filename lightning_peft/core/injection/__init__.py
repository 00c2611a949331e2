"""How adapters go in and come out.

Read ``apply`` (plan, check, commit), ``rollback`` (all or nothing), ``widen_record`` (from a part to the module around
it), ``attach``, ``overrides`` (an adapter's own values of base parameters), then ``merge``, ``low_rank_factors``,
``remove``, ``reset``, ``remove_reparameterization`` and ``saving_base``.
"""
