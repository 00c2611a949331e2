"""Serve one base model and a folder of adapters over HTTP (``lightning-peft serve``).

Read ``server`` first (the processes and their queues), then ``routes`` and ``openai`` (what a client sends and gets),
``engine`` (which request runs when), ``predictor`` and ``generator`` (one batch over mixed adapters), ``joined_cache``
and ``sequence`` (what one generated text needs), and ``pool`` (which adapters are in memory). ``metrics`` counts.
"""
