"""Rows and columns of a batch: what is trimmed, what is taken, and which rows have a gradient."""

import pytest
import torch

from tests.trainer.batches import make_batch
from trl_capo.trainer.repack import has_gradient, take, trim


def test_trim_removes_only_what_is_padding_in_every_row():
    batch = make_batch([2, 4, 1], [3, 1, 5], prompt_width=6, width=9)
    batch |= {
        "old_per_token_logps": torch.randn(3, 9),
        "importance_sampling_ratio": torch.rand(3, 1),
    }
    trimmed = trim(batch)
    assert trimmed.keys() == batch.keys()
    for key in ("prompt_ids", "prompt_mask"):
        assert torch.equal(trimmed[key], batch[key][:, -4:])
    for key in ("completion_ids", "completion_mask", "old_per_token_logps"):
        assert torch.equal(trimmed[key], batch[key][:, :5])
    for key in ("importance_sampling_ratio", "advantages", "num_items_in_batch"):
        assert torch.equal(trimmed[key], batch[key]), key


def test_trim_counts_columns_where_masks_have_holes():
    """A count of tokens would cut the last ones off."""
    batch = make_batch([3, 1], [6, 2], prompt_width=5, width=8)
    batch["completion_mask"][0, 1:4] = 0
    batch["prompt_mask"][0, 3] = 0
    batch["tool_mask"] = torch.ones(2, 8, dtype=torch.long)
    trimmed = trim(batch)
    assert trimmed["completion_mask"].shape == (2, 6) and trimmed["completion_mask"][0].tolist() == [1, 0, 0, 0, 1, 1]
    assert trimmed["prompt_mask"].tolist() == [[1, 0, 1], [0, 0, 1]] and trimmed["tool_mask"].shape == (2, 6)


def test_trim_of_completions_without_tokens_keeps_a_column():
    """Truncated completions have no mask, and a forward needs a token to score."""
    batch = make_batch([2, 3], [4, 4])
    batch["completion_mask"].zero_()
    trimmed = trim(batch)
    assert trimmed["completion_ids"].shape == (2, 1) and trimmed["completion_mask"].sum() == 0
    assert trimmed["prompt_ids"].shape == (2, 3)


def test_trim_of_empty_prompts_keeps_a_column():
    """TRL scores a completion's first token from the column before it. Only a rollout function has such prompts."""
    batch = make_batch([0, 0], [2, 3], prompt_width=4)
    assert trim(batch)["prompt_ids"].shape == (2, 1)


def test_trim_keeps_one_column_tensors_beside_one_column_completions():
    batch = make_batch([2, 3], [1, 1]) | {"importance_sampling_ratio": torch.rand(2, 1)}
    trimmed = trim(batch)
    assert torch.equal(trimmed["importance_sampling_ratio"], batch["importance_sampling_ratio"])
    assert torch.equal(trimmed["completion_ids"], batch["completion_ids"])


@pytest.mark.parametrize(
    ("multiple", "widths"), [(None, (3, 5)), (1, (3, 5)), (4, (4, 8)), (8, (8, 8)), (16, (8, 10)), (64, (8, 10))]
)
def test_trim_rounds_up_to_a_multiple_but_not_beyond_what_is_there(multiple, widths):
    trimmed = trim(make_batch([3, 2], [5, 4], prompt_width=8, width=10), multiple)
    assert (trimmed["prompt_ids"].size(1), trimmed["completion_ids"].size(1)) == widths


def test_take_keeps_what_is_not_one_entry_a_row():
    batch = make_batch([2, 3, 1], [4, 2, 1])
    taken = take(batch, torch.tensor([2, 0]))
    assert torch.equal(taken["completion_ids"], batch["completion_ids"][[2, 0]])
    assert taken["num_items_in_batch"] == batch["num_items_in_batch"]


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_with_gradient(per_token):
    batch = make_batch([1] * 5, [3, 3, 3, 3, 3])
    batch["advantages"] = torch.tensor([0.5, 0.0, -1e-30, 2.0, -0.0])
    batch["completion_mask"][3] = 0  # truncated
    expected = [True, False, True, False, False]
    if per_token:
        batch["advantages"] = batch["advantages"].unsqueeze(1) * torch.tensor([0.0, 1.0, 0.0])
    assert has_gradient(batch).tolist() == expected
    batch["tool_mask"] = torch.ones(5, 3, dtype=torch.long)
    batch["tool_mask"][0] = 0  # an environment wrote all of it
    assert has_gradient(batch).tolist() == [False, *expected[1:]]
