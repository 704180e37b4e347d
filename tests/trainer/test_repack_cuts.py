"""Cuts of rows into micro-batches, against all cuts."""

import itertools
import random

import pytest

from trl_capo.trainer.repack import even_cuts


Sizes = list[tuple[int, int]]  # tokens of each row's prompt and completion


def largest_part(sizes: Sizes, cuts: list[int]) -> int:
    """Padded tokens of the largest part: rows times its longest prompt and its longest completion."""
    parts, start = [], 0
    for rows in cuts:
        part = sizes[start : start + rows]
        parts.append(rows * (max(prompt for prompt, _ in part) + max(completion for _, completion in part)))
        start += rows
    return max(parts)


def smallest_largest_part(sizes: Sizes, num_parts: int) -> int:
    """By trying all cuts into nonempty parts."""
    tokens = []
    for borders in itertools.combinations(range(1, len(sizes)), num_parts - 1):
        ends = [0, *borders, len(sizes)]
        tokens.append(largest_part(sizes, [b - a for a, b in itertools.pairwise(ends)]))
    return min(tokens)


def test_no_cut_has_a_smaller_largest_part():
    rng = random.Random(0)
    for _ in range(600):
        sizes = [
            (rng.randrange(1, 20), rng.choice([1, 2, 3, 7, 30, rng.randrange(1, 60)]))
            for _ in range(rng.randrange(1, 11))
        ]
        sizes.sort(key=sum, reverse=True)
        num_parts = rng.randrange(1, len(sizes) + 1)
        cuts = even_cuts(sizes, num_parts)
        assert len(cuts) == num_parts and sum(cuts) == len(sizes) and min(cuts) >= 1
        assert largest_part(sizes, cuts) == smallest_largest_part(sizes, num_parts), (sizes, cuts)


@pytest.mark.parametrize(
    ("lengths", "num_parts", "cuts"),
    [
        ([7], 1, [1]),
        ([5, 4, 3], 3, [1, 1, 1]),
        ([4, 4, 4, 4], 2, [2, 2]),
        ([4, 4, 4, 4, 4], 1, [5]),
        ([9, 1], 2, [1, 1]),
        ([0, 0, 0], 2, None),
    ],
    ids=["one row", "a row each", "equal", "one part", "two rows", "empty rows"],
)
def test_simple_cuts(lengths, num_parts, cuts):
    actual = even_cuts([(0, length) for length in lengths], num_parts)
    assert len(actual) == num_parts and sum(actual) == len(lengths) and min(actual) >= 1
    assert cuts is None or actual == cuts


def test_parts_that_are_left_over_split_the_largest():
    """One long row fixes the largest part; the short ones could share one, but then most parts would be empty."""
    cuts = even_cuts([(0, 100)] + [(0, 1)] * 16, 5)
    assert cuts[0] == 1 and sorted(cuts[1:]) == [4, 4, 4, 4]


@pytest.mark.parametrize(("num_rows", "num_parts"), [(0, 1), (2, 3)])
def test_too_few_rows_cannot_be_cut(num_rows, num_parts):
    with pytest.raises(ValueError, match=f"{num_rows} rows cannot be cut into {num_parts} parts"):
        even_cuts([(1, 3)] * num_rows, num_parts)
