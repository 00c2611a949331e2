"""Methods compared on real data with real pretrained weights: see ``docs/results.md``."""
