"""What builds files that ship with the package, and its documentation; not installed.

``python -m tools.build_demo`` makes the demo corpus and tokenizer, with ``rst`` as its reader of reStructuredText.
``griffe_docstrings`` prepares docstrings for the API reference (mkdocs.yml names it).
"""
