"""Adapter directories: save, load, describe, and checkpoints turned into them.

``directory`` reads and writes the files and guards against hostile ones, ``peft`` converts to and from Hugging Face
PEFT, ``registry`` says which converter serves which method.
"""
