"""``python -m lightning_peft``: the same as the ``lightning-peft`` command."""

from lightning_peft.cli.main import main

main()
