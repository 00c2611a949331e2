"""The ``lightning-peft`` command: LightningCLI's subcommands and our own, one file each."""
