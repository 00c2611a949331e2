"""``import lightning_peft`` imports no heavy package other than Lightning's own dependencies."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("transformers", "datasets", "wandb", "matplotlib", "torchmetrics", "peft", "jsonargparse", "pandas", "sympy")

# Lightning imports some of these if they are installed. They are removed after it, so any further import of one comes
# from this package.
SCRIPT = """
import sys
import lightning.pytorch

heavy = sys.argv[1:]
for name in list(sys.modules):
    if name.partition(".")[0] in heavy:
        del sys.modules[name]

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            raise AssertionError(f"import lightning_peft imports {name}: import it in the function that needs it")

sys.meta_path.insert(0, Refuse())
import lightning_peft
"""


def test_nothing_heavy_is_imported():
    run = subprocess.run([sys.executable, "-c", SCRIPT, *HEAVY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
