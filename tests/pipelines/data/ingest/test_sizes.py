"""Counting sizes: every image once, and the commonest first."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.ingest.sizes import mixed_sizes, sizes_of

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(SIZES, st.integers(0, 50), st.lists(SIZES, min_size=1, max_size=50), st.integers(0, 80))
def test_reasons_are_counted_unless_few_are_about_the_size(
    kept: tuple[int, int], num_kept: int, others: list[tuple[int, int]], broken: int
) -> None:
    reasons = [f"size {height}x{width} is not {kept[0]}x{kept[1]}" for height, width in others]
    found = sizes_of(["truncated or damaged (size 3x3 is not read)"] * broken + reasons, kept, num_kept)
    expected = Counter(others) + Counter({kept: num_kept})
    assert found == (expected if len(others) >= broken else Counter())


def test_the_commonest_sizes_are_named() -> None:
    sizes = {(2, 3): 1, (480, 640): 1200, (1, 1): 1, (640, 480): 300, (9, 9): 2}
    text = str(mixed_sizes("photos", sizes, " among the first 100"))
    assert "holds images of 5 sizes among the first 100: 480x640 (1,200), 640x480 (300), 9x9 (2) and 2 more" in text
