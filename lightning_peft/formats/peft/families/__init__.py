"""One converter for each kind of PEFT's adapters."""
