"""Repacked shares: gradients against a loop over rows, and sizes against TRL's micro-batches."""

import random

import pytest
import torch

from tests.trainer.batches import make_batch
from trl_capo.trainer.repack import (
    MEANS_OVER_ROWS,
    SUMS_OVER_TOKENS,
    choose_rows,
    concatenate,
    even_cuts,
    has_gradient,
    repack,
    row_sizes,
)


def random_share(
    rng: random.Random, num_parts: int, num_rows: int, width: int = 40
) -> tuple[list[dict], torch.Tensor]:
    """Micro-batches with about half the rows without advantage, and which rows have one."""
    micro_batches = []
    for part in range(num_parts):
        lengths = [min(width, int(rng.lognormvariate(2, 0.8)) + 1) for _ in range(num_rows)]
        batch = make_batch([rng.randrange(1, 7) for _ in lengths], lengths, 6, width, seed=rng.randrange(10**6) + part)
        batch["advantages"] *= torch.tensor([rng.random() < 0.5 for _ in lengths])
        micro_batches.append(batch)
    num_items = sum(batch["num_items_in_batch"] for batch in micro_batches)  # TRL counts a whole generation
    micro_batches = [batch | {"num_items_in_batch": num_items} for batch in micro_batches]
    return micro_batches, torch.cat([has_gradient(batch) for batch in micro_batches])


def repack_ranks(ranks: list[list[dict]], keep: list[torch.Tensor], loss_type: str) -> list[list[dict]]:
    """One optimizer step on several ranks, as the trainer does it: all cut by the longest row at each place."""
    num_parts, rows_of_trl = len(ranks[0]), len(ranks[0][0]["prompt_ids"])
    shares = [concatenate(micro_batches) for micro_batches in ranks]
    num_rows = max(num_parts, *(int(kept.sum()) for kept in keep))
    chosen = [choose_rows(share, kept, num_rows) for share, kept in zip(shares, keep, strict=True)]
    sizes = torch.stack([row_sizes(share)[rows] for share, rows in zip(shares, chosen, strict=True)]).amax(dim=0)
    cuts = even_cuts(sizes.tolist(), num_parts)
    return [repack(share, rows, cuts, rows_of_trl, loss_type) for share, rows in zip(shares, chosen, strict=True)]


def row_loss(weights: torch.Tensor, ids: list[int], advantage: float) -> torch.Tensor:
    """Stands in for one row's summed token losses: any nonlinear function of its unpadded tokens."""
    return advantage * torch.tanh(weights[torch.tensor(ids)]).cumsum(0).sum()


def literal_loss(weights, micro_batches, loss_type: str) -> torch.Tensor:
    """The loss of an optimizer step by a loop over rows, with each type's normalization and `loss_scale`."""
    total = torch.zeros((), dtype=torch.double)
    for batch in micro_batches:
        losses = []
        for ids, mask, advantage in zip(
            batch["completion_ids"], batch["completion_mask"], batch["advantages"], strict=True
        ):
            ids = ids[mask.bool()].tolist()
            loss = row_loss(weights, ids, advantage.item())
            losses.append(loss / len(ids) if loss_type in ("grpo", "sapo") else loss)
        loss = torch.stack(losses)
        loss = loss.mean() if loss_type in MEANS_OVER_ROWS else loss.sum() / batch["num_items_in_batch"]
        total = total + loss * batch.get("loss_scale", 1.0) / len(micro_batches)
    return total


@pytest.mark.parametrize("loss_type", SUMS_OVER_TOKENS + MEANS_OVER_ROWS)
def test_repacked_shares_have_the_same_gradient(loss_type):
    rng = random.Random(1)
    for _ in range(15):
        num_parts, num_rows = rng.randrange(1, 5), rng.randrange(1, 6)
        weights = torch.randn(50, dtype=torch.double, requires_grad=True)
        micro_batches, keep = random_share(rng, num_parts, num_rows)
        [repacked] = repack_ranks([micro_batches], [keep], loss_type)
        assert len(repacked) == num_parts
        gradients = [
            torch.autograd.grad(literal_loss(weights, batches, loss_type), weights)[0]
            for batches in (micro_batches, repacked)
        ]
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=1e-10)
        for batch in repacked:
            assert batch["prompt_mask"][:, 0].any() and batch["completion_mask"][:, -1].any(), "not trimmed"


def identities(batch: dict) -> list[tuple]:
    """Each row's unpadded tokens, which no two rows of a test share."""
    masks = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return [tuple(row[mask].tolist()) for row, mask in zip(ids, masks, strict=True)]


def test_kept_rows_stay_and_only_shortest_fill_up():
    rng = random.Random(2)
    filled = 0
    for _ in range(20):
        num_parts, num_rows = 4, 3
        micro_batches = random_share(rng, num_parts, num_rows)[0]
        for batch in micro_batches[: rng.randrange(num_parts + 1)]:
            batch["advantages"].zero_()
        kept = torch.cat([has_gradient(batch) for batch in micro_batches])
        [repacked] = repack_ranks([micro_batches], [kept], "grpo")
        before = [row for batch in micro_batches for row in identities(batch)]
        after = [row for batch in repacked for row in identities(batch)]
        assert [len(row) for row in after] == sorted((len(row) for row in after), reverse=True)
        wanted = {row for row, k in zip(before, kept.tolist(), strict=True) if k}
        fill = [row for row in after if row not in wanted]
        dropped = [row for row in before if row not in wanted]
        assert wanted <= set(after) <= set(before) and len(set(after)) == len(after)
        assert len(after) == max(len(wanted), num_parts)
        assert sorted(map(len, fill)) == sorted(map(len, dropped))[: len(fill)]
        filled += len(fill)
    assert filled > 0


def test_no_micro_batch_is_larger_than_trls():
    """On one rank: what fitted into memory before still does."""
    rng = random.Random(3)
    for _ in range(100):
        num_parts, num_rows = rng.randrange(1, 9), rng.randrange(1, 6)
        micro_batches, keep = random_share(rng, num_parts, num_rows)
        keep = keep if rng.random() < 0.5 else torch.ones_like(keep)
        [repacked] = repack_ranks([micro_batches], [keep], "dapo")
        longest = concatenate(micro_batches)
        width = int(longest["prompt_mask"].sum(dim=1).max() + longest["completion_mask"].sum(dim=1).max())
        for batch in repacked:
            assert batch["prompt_ids"].numel() + batch["completion_ids"].numel() <= num_rows * width


def test_opposite_lengths_do_not_make_a_micro_batch_larger_than_trls():
    """Long prompts with short answers beside short prompts with long ones: the part is wider than any of its rows."""
    micro_batches = [make_batch([50, 49, 1], [50, 1, 49]), make_batch([50, 49, 1], [50, 1, 49])]
    keep = torch.ones(6, dtype=torch.bool)
    [repacked] = repack_ranks([micro_batches], [keep], "grpo")
    tokens = [batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in repacked]
    assert max(tokens) <= 3 * (50 + 50)


def test_ranks_cut_alike_and_none_gets_a_micro_batch_larger_than_trls():
    """A rank with few rows to keep is filled up with dropped ones: these must not cost it its memory."""
    rng = random.Random(4)
    worst = 0.0
    for _ in range(100):
        num_parts, num_rows, width = 8, 4, 100
        short_and_long = [[100] * 7 + [5] * 25, [100] * 32]
        ranks, keep = [], []
        for lengths, share_kept in zip(short_and_long, (1.0, rng.random() * 0.3), strict=True):
            rng.shuffle(lengths)
            ranks.append(
                [
                    make_batch([1] * num_rows, lengths[i * num_rows : (i + 1) * num_rows], width=width, seed=i)
                    for i in range(num_parts)
                ]
            )
            keep.append(torch.tensor([rng.random() < share_kept for _ in lengths]))
        repacked = repack_ranks(ranks, keep, "grpo")
        rows = [[len(batch["completion_ids"]) for batch in batches] for batches in repacked]
        assert rows[0] == rows[1], "TRL gathers one number a row"
        for batches in repacked:
            tokens = max(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches)
            worst = max(worst, tokens / (num_rows * (1 + width)))
    assert worst <= 1.0, f"a micro-batch of {worst:.1f} times the tokens of TRL's largest"
