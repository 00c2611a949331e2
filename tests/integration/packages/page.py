"""Generate docs/packages.md, which lists what works with other packages, from the table that the tests run.

``python -m tests.integration.packages.page > docs/packages.md`` writes the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.integration.packages.case import MERGED, METHODS, Case
from tests.integration.packages.table import CASES

ROOT = Path(__file__).parents[3]


def versions(file: str) -> dict[str, str]:
    """The releases in a file of ``.ci``: those that CI tests, or those that were tested by hand."""
    lines = (ROOT / ".ci" / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def arguments(case: Case) -> str:
    """The arguments that the methods need; methods with the same arguments are grouped."""
    texts: dict[str, list[str]] = {}
    for method, options in case.options.items():
        texts.setdefault(", ".join(f"{k}={v!r}" for k, v in options.items()), []).append(method)
    needed = [f"{', '.join(methods)}: `{text}`" for text, methods in texts.items()]
    return "; ".join([*needed, *(f"{method} is refused: {why}" for method, why in case.refused.items())])


def page() -> str:
    """The documentation page."""
    by_hand = {package: f"{version} *(by hand)*" for package, version in versions("packages_by_hand.txt").items()}
    known = by_hand | versions("packages.txt")

    def works(case: Case, methods: Iterable[str] = METHODS) -> str:
        return ", ".join(method for method in methods if method not in case.refused)

    rows = [
        f"| {case.package} {known[case.package]} | {name.partition(' ')[2]} | {works(case)} | {works(case)} "
        f"| {works(case)} | {works(case, MERGED)} | {arguments(case)} |"
        for name, case in CASES.items()
    ]
    return (
        "\n".join(
            [
                "# Models of other packages",
                "",
                "A test covers every cell with a tiny, randomly initialised model of the package in the release shown.",
                "It runs one method of each of three families: `LoRA(r=2)` on `all-linear`, `SSF()` and `BitFit()`.",
                "The last column has the arguments that a model needs. `pip install lightning_peft[integrations]`",
                "installs the packages, `pytest tests/integration/packages` runs the tests, and",
                "`python -m tests.integration.packages.page > docs/packages.md` writes this page. CI does not install",
                "the packages that are marked *by hand*: their tests were run with the releases in the table.",
                "",
                "| package | model | inject | train | checkpoint | merge | arguments |",
                "|---|---|---|---|---|---|---|",
                *rows,
                "",
                "- **inject**: the method finds its layers, and unloading restores every class, key and frozen value.",
                "- **train**: three steps in a Trainer change the output; frozen parameters stay the same bit for bit.",
                "- **checkpoint**: the Trainer's checkpoint holds no frozen parameter, and loads into a new module.",
                "- **merge**: the merged model gives the same outputs as the adapted one. BitFit has nothing to merge,",
                "  because it trains the model's own biases.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    print(page(), end="")
