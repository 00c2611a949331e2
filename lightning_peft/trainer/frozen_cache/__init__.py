"""Compute the frozen part of a model once for each row of the data, and train the rest from the stored activations.

Read ``callback`` (the life of a run), ``first_batch`` (which calls of frozen modules can be skipped), ``replay`` (how
they are skipped), then ``rows`` (how a row of a batch is recognised) and ``store`` (the files).
"""
