from pathlib import Path

from benchmarks.growth import main


def test_the_table_has_a_line_for_each_number_of_adapters(tmp_path: Path):
    page = tmp_path / "growth.md"
    main(["--adapters", "1", "2", "--layers", "1", "--repeats", "1", "--markdown", str(page)])
    assert "| 1 | " in page.read_text()
    assert "| 2 | " in page.read_text()
