"""The benchmark of mixed batches runs, and its variants compute the same rows."""

from __future__ import annotations

import torch

from benchmarks.rows import main, parse, variants

TINY = ["--rows", "3", "--adapters", "2", "--length", "4", "--hidden", "64", "--layers", "1", "--rank", "2"]


def test_table(tmp_path, capsys):
    assert main([*TINY, "--repeats", "2", "--markdown", str(tmp_path / "rows.md")]) == 0
    assert "peft, 2 adapters" in capsys.readouterr().out
    assert "| ours, 2 adapters |" in (tmp_path / "rows.md").read_text()


@torch.no_grad()
def test_variants_differ_where_they_should():
    runs = variants(parse(TINY))
    outputs = {}
    for name, (context, forward) in runs.items():
        with context():
            outputs[name] = forward()
    mixed, one = outputs["ours, 2 adapters"], outputs["ours, one adapter"]
    torch.testing.assert_close(mixed[[0, 2]], one[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], one[1], atol=1e-4)
    torch.testing.assert_close(outputs["ours, every second row none"][0], outputs["base"][0], rtol=1e-4, atol=1e-5)
