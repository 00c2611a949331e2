"""``lightning-peft compare``: train several methods on one task under equal conditions, and recommend one.

| file | contents |
|---|---|
| ``candidates.py`` | what is compared: methods, fixed arguments, search ranges |
| ``run.py`` | one training run |
| ``part.py`` | stop a run after some of its steps, and keep its state |
| ``measure.py`` | time, memory and checkpoint size of a run |
| ``fractions.py`` | a fixed part of the training data or of the validation data |
| ``store.py`` | results on disk, and the locks by which processes share the work |
| ``search.py`` | the search for a candidate's learning rate and arguments, with Optuna |
| ``study.py`` | the order of the work: searches, then runs of every candidate or of the best, then further seeds |
| ``recommend.py`` | the method to take, and why |
| ``report.py``, ``plots.py`` | results.csv, report.md, the terminal's table, plots |
"""
