"""Adapter directories: save, load and describe them, and convert between them and checkpoints.

Read ``save`` and ``load`` (the public functions), ``directory`` (the files, and guards against hostile ones),
``registry`` (which converter serves which method), ``peft`` (conversion to and from Hugging Face PEFT), ``native``
(methods that PEFT cannot represent), then ``describe`` and ``checkpoint``.
"""
