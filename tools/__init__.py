"""Scripts that build files of the package and its documentation; not installed.

``python -m tools.build_demo`` builds the demo corpus and tokenizer, and uses ``rst`` to read reStructuredText.
``griffe_docstrings`` prepares docstrings for the API reference (mkdocs.yml names it).
"""
