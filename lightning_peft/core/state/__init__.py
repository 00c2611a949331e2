"""What trains and what is saved.

Read ``plan`` (what a method intends) and ``report`` (the table that users see); what was done is in
:mod:`lightning_peft.core.record`. Then ``state_dict``, ``adapter_records``, ``moved`` (frozen values that change),
``consistency`` (record against model), ``fingerprint``, ``freezing``, and for files ``digest``, ``torch_file`` and
``torch_zip``.
"""
