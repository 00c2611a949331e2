"""In files that omit options with default values, a missing option means the same as in PEFT."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files, write_files
from tests.features import HOLES, ROWS
from tests.formats.models import llama, logits, made_by_peft, read_by_peft, tokens

#: the first row of tests/features.py for each class of PEFT's that is read
CONFIGS = {
    kind: next(row for row in ROWS.values() if row.theirs[0] == kind)
    for kind in dict.fromkeys(row.theirs[0] for name, row in ROWS.items() if (name, "from PEFT") not in HOLES)
}
#: without this option, PEFT computed OFT differently
NEEDED = {"oft_block_size"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_option_has_pefts_default(kind, tmp_path):
    base, x, config = llama(), tokens(), getattr(peft, kind)(**CONFIGS[kind].theirs[1])
    made_by_peft(base, config, tmp_path)
    files = read_files(tmp_path)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    short = {
        option: value
        for option, value in files.config.items()
        if option in NEEDED or option not in defaults or value != getattr(defaults[option], "value", defaults[option])
    }
    assert len(short) < len(files.config)
    write_files(tmp_path, short, files.tensors, {}, None)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path)
    expected = logits(read_by_peft(base, tmp_path), x)
    torch.testing.assert_close(logits(here, x)[:, -7:], expected[:, -7:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[:, -7:], logits(base, x), atol=1e-3)
