"""The adapter directory: what is written and read, and how (see ``save.py`` and ``load.py``)."""
