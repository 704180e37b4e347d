"""Repacking as pure functions: cuts against all cuts, gradients against a loop over rows, padding against forwards."""

import itertools
import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_capo.trainer.repack import (
    MEANS_OVER_ROWS,
    SUMS_OVER_TOKENS,
    Repacking,
    choose_rows,
    concatenate,
    even_cuts,
    has_gradient,
    positions_depend_on_padding,
    repack,
    row_sizes,
    take,
    trim,
    what_is_exact,
)


# even_cuts -----------------------------------------------------------------------------------------------------------


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


# trim, take, has_gradient --------------------------------------------------------------------------------------------


def make_batch(prompts: list[int], completions: list[int], prompt_width=None, width=None, seed=0) -> dict:
    """Rows with these lengths, padded as TRL does; ids are random and nonzero, padding is 0."""
    generator = torch.Generator().manual_seed(seed)
    prompt_width, width = prompt_width or max(prompts), width or max(completions)
    prompt_mask = torch.arange(prompt_width) >= prompt_width - torch.tensor(prompts).unsqueeze(1)
    completion_mask = torch.arange(width) < torch.tensor(completions).unsqueeze(1)
    return {
        "prompt_ids": torch.randint(2, 50, prompt_mask.shape, generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": torch.randint(2, 50, completion_mask.shape, generator=generator) * completion_mask,
        "completion_mask": completion_mask.long(),
        "advantages": torch.randn(len(prompts), generator=generator),
        "num_items_in_batch": completion_mask.sum(),
    }


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


# repack --------------------------------------------------------------------------------------------------------------


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


# what_is_exact, positions_depend_on_padding --------------------------------------------------------------------------

PLAIN = dict(
    loss_type="grpo",
    beta=0.0,
    top_entropy_quantile=1.0,
    entropy_bonus=False,
    aux_loss=False,
    is_vlm=False,
    padding_matters=False,
)


@pytest.mark.parametrize(
    ("changes", "steps", "reason"),
    [
        ({}, (True, True, True), ""),
        *[({"loss_type": name}, (True, True, True), "") for name in ("dapo", "cispo", "vespo")],
        *[({"loss_type": name}, (True, True, True), "") for name in ("grpo", "sapo", "luspo", "dr_grpo")],
        ({"beta": 0.1}, (True, True, False), "KL term"),
        ({"beta": -0.1}, (True, True, False), "KL term"),
        ({"loss_type": "bnpo"}, (True, False, False), "loss_type='bnpo'"),
        ({"loss_type": "new_in_trl"}, (True, False, False), "loss_type='new_in_trl'"),
        ({"top_entropy_quantile": 0.2}, (True, False, False), "top_entropy_quantile"),
        ({"entropy_bonus": True, "beta": 0.1}, (True, False, False), "entropy bonus"),
        ({"aux_loss": True}, (True, False, False), "experts"),
        ({"padding_matters": True, "beta": 0.1}, (False, False, False), "padding"),
        ({"is_vlm": True, "loss_type": "bnpo"}, (False, False, False), "images"),
    ],
    ids=lambda value: "-".join(map(str, sum(value.items(), ()))) if isinstance(value, dict) else "",
)
def test_what_is_exact(changes, steps, reason):
    repacking = what_is_exact(**{**PLAIN, **changes})
    assert (repacking.trim, repacking.sort, repacking.prune) == steps
    assert reason in repacking.reason and bool(repacking.reason) == (steps != (True, True, True))
    assert isinstance(repacking, Repacking)


SIZES = dict(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT_SIZES = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=64)
BART_SIZES = dict(
    vocab_size=32,
    d_model=16,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LLAMA_4_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ARCHITECTURES = {
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES),
    "llama": ("LlamaConfig", SIZES),
    "sliding window": ("MistralConfig", SIZES | {"sliding_window": 4}),
    "rope of each layer type": ("Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 4}),
    "experts": ("Qwen3MoeConfig", SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "alibi": ("BloomConfig", dict(vocab_size=32, hidden_size=16, n_layer=2, n_head=4)),
    "linear attention": (
        "Qwen3NextConfig",
        SIZES
        | dict(
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "yarn": (
        "LlamaConfig",
        SIZES
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "dynamic": ("LlamaConfig", SIZES | {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "longrope": (
        "Phi3Config",
        SIZES
        | {
            "max_position_embeddings": 32,
            "original_max_position_embeddings": 11,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 11,
            },
        },
    ),
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gpt neo": (
        "GPTNeoConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            intermediate_size=32,
        ),
    ),
    "starcoder": ("GPTBigCodeConfig", GPT_SIZES),
    # Positions from the mask: the padding does not matter, though there is a table of them.
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
    ),
    # Absolute positions under other names, or with a table longer than the context.
    "dynamic of each layer type": (
        "Gemma3TextConfig",
        SIZES
        | {
            "head_dim": 16,
            "sliding_window": 4,
            "max_position_embeddings": 8,
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC},
        },
    ),
    "ministral 3": ("Ministral3Config", SIZES | {"head_dim": 16, "rope_parameters": LLAMA_4_SCALING}),
    "llama 4": (
        "Llama4TextConfig",
        SIZES
        | dict(
            head_dim=16,
            intermediate_size_mlp=32,
            num_local_experts=2,
            attention_chunk_size=64,
            floor_scale=4,
            attn_scale=1.0,
            attn_temperature_tuning=True,
            no_rope_layers=[1, 0],
        ),
    ),
    "gpt": ("OpenAIGPTConfig", GPT_SIZES),
    "xglm": (
        "XGLMConfig",
        dict(
            vocab_size=32,
            d_model=16,
            ffn_dim=32,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
        ),
    ),
    "biogpt": (
        "BioGptConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
    "bart": ("BartConfig", BART_SIZES),
    # A recurrent state that padding on the left changes.
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        SIZES | dict(lru_width=64, attention_window_size=32, block_types=["recurrent", "attention"]),
    ),
}


def tiny_random_model(architecture: str, seed: int = 0):
    name, sizes = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**sizes, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # as initialized, many positions would hardly matter
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


def change_by_padding(model) -> float:
    """How far log-probs move when padding is added on both sides of a sequence."""
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (1, 10))
    padded = torch.nn.functional.pad(ids, (5, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 3))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        actual = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 5:15]
    return (expected.log_softmax(dim=-1) - actual.log_softmax(dim=-1)).abs().max().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_whose_log_probs_depend_on_padding_are_known(architecture):
    model = tiny_random_model(architecture)
    change = change_by_padding(model)
    # Rounding moves log-probs by up to 1e-5, more on one processor than on another; positions that are read, by 0.04
    # and more.
    assert change < 1e-3 or change > 1e-2, "neither rounding nor clearly positions"
    assert positions_depend_on_padding(model) or change < 1e-3


@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3", "llama", "sliding window", "rope of each layer type", "experts", "yarn"]
)
def test_common_models_are_trimmed(architecture):
    assert not positions_depend_on_padding(tiny_random_model(architecture))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "wpe"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]},
    ],
    ids=["attention", "positions", "positions trained in full"],
)
def test_learned_positions_are_known_under_an_adapter(options):
    model = get_peft_model(
        tiny_random_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **options)
    )
    assert change_by_padding(model) > 1e-3 and positions_depend_on_padding(model)
