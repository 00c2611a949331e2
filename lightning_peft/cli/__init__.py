"""The ``lightning-peft`` command. ``main`` has LightningCLI's subcommands; each of our own has a file."""
