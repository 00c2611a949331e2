"""Imports the package early, so that torchvision can be imported in every process of pytest.

With `-n`, the tests run in other processes. pytest's own process imports the classes of the warnings that they report,
and with these `lightning`, which imports torchvision. It loads conftest files, but no tests.
"""

import tests.integration.packages  # noqa: F401
