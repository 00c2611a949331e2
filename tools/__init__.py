"""What builds files that ship with the package; not installed.

``python -m tools.build_demo`` makes the demo corpus and tokenizer, with ``rst`` as its reader of reStructuredText.
"""
