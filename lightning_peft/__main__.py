"""``python -m lightning_peft``: the same as the ``lightning-peft`` command."""

from lightning_peft_command import main

main()
