"""docs/schedules.md holds what its script generates."""

from benchmarks.schedules.main import PAGE, filled


def test_pictures_and_tables_are_the_generated_ones() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python benchmarks/schedules/main.py --write"
