"""Everything that a run writes to the console and to its loggers.

``keys`` names every logged value once. :class:`AdapterMonitor` in ``monitor`` logs the values of a run, which ``norms``
and ``throughput`` measure; ``loggers`` writes to loggers of any kind; ``artifacts`` uploads the adapters; ``run_ids``
continues the runs of W&B and MLflow; ``console`` prints the table of matches and the sizes.
"""
