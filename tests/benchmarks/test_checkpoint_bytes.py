"""The measurement of checkpoint bytes, on one device, and its table."""

import json

from benchmarks.checkpoint_bytes import measure, table


def test_bytes_of_one_device(tmp_path):
    measure("", tmp_path)
    found = json.loads((tmp_path / "sizes.json").read_text())
    assert found["trainable"] < found["weights"] < found["full"] < 4 * found["trainable"] + 1_000_000 < found["model"]
    assert table({"one device": found}).splitlines()[-1].startswith(f"| one device | {found['trainable']:,} |")
