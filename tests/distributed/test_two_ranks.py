"""Two processes, groups that straddle them: the same numbers as the literal oracles, on both ranks."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from tests.helpers import literal_advantages_of_groups, literal_mean_logp, prompt_dataset


@pytest.fixture
def ranks(one_host) -> list[dict]:
    return [rank["two_ranks"] for rank in one_host]


def test_advantages_of_straddling_groups(ranks, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)  # the learning rate is 0: it stays the policy
    per_rank = [rank["straddling_groups"]["seen"] for rank in ranks]
    nonzero = 0
    for first, second in zip(*per_rank, strict=True):
        assert first["advantages"] == second["advantages"] and first["mean_logps"] == second["mean_logps"]
        rows = first["rows"] + second["rows"]
        logps = np.array([literal_mean_logp(model, *row) for row in rows])
        correct = np.array([float(sum(completion) % 2 == 0) for _, completion in rows])
        ppl = np.exp(-logps)
        kept = np.where(correct == 1, ppl <= 2.5, ppl >= 1.05)
        shape = np.array(first["correct"]).shape
        assert np.array_equal(correct.reshape(shape), first["correct"])
        np.testing.assert_allclose(np.array(first["mean_logps"]).flatten(), logps, atol=1e-4)
        for scores, atol in ((logps, 1e-4), (np.array(first["mean_logps"]).flatten(), 1e-6)):
            literal = literal_advantages_of_groups(correct.reshape(shape), scores.reshape(shape)).flatten()
            literal = np.where(kept, literal, 0.0)
            np.testing.assert_allclose(np.array(first["advantages"]).flatten(), literal, atol=atol)
        local = first["local_advantages"] + second["local_advantages"]
        np.testing.assert_allclose(local, np.array(first["advantages"]).flatten(), atol=1e-7)
        nonzero += int((literal != 0).sum())
    assert nonzero > 0
    assert np.array(per_rank[0][0]["correct"]).shape == (1, 8)


def test_evaluation_counts_every_prompt_once(ranks):
    """Seven prompts in batches of two: the last batch is filled up with the first prompt again."""
    run = ranks[0]["straddling_groups"]
    entry = next(entry for entry in run["log"] if "eval_capo/auc_within" in entry)
    correct = np.concatenate([seen["correct"] for seen in run["seen"] if seen["mode"] == "eval"])
    scores = np.concatenate([seen["mean_logps"] for seen in run["seen"] if seen["mode"] == "eval"])
    assert len(correct) == 8
    correct, scores = correct[:7], scores[:7]
    mixed = [p for p in range(7) if 0 < correct[p].sum() < 4]
    expected = np.mean([roc_auc_score(correct[p], scores[p]) for p in mixed])
    assert entry["eval_capo/auc_within"] == pytest.approx(expected)
    assert entry["eval_capo/auc_pooled"] == pytest.approx(roc_auc_score(correct.flatten(), scores.flatten()))
    assert entry["eval_capo/frac_mixed"] == pytest.approx(len(mixed) / 7)


def test_ranks_call_a_reference_equally_often(ranks):
    first, second = (rank["uneven_reference_rows"] for rank in ranks)
    needed = ~np.isnan(np.array(first["seen"][0]["ref_mean_logps"], dtype=float))
    assert needed[:2].any() and not needed[2:].any()
    assert first["calls"] == second["calls"] == 1


def test_with_the_linear_surrogate_it_is_grpo_on_two_ranks(ranks):
    for rank in ranks:
        assert rank["linear_surrogate"]["change"] >= 1e-2
        assert rank["linear_surrogate"]["difference"] <= 1e-5


def test_ranks_generate_for_the_same_choice_of_prompts(ranks):
    first, second = (rank["chosen_prompts"] for rank in ranks)
    assert first["state"] == second["state"] and first["state"]["generation"] == 3
    prompts = list(dict.fromkeys(example["prompt"][0]["content"] for example in prompt_dataset()))  # distinct ones
    for generation, rows in enumerate(zip(first["asked"], second["asked"], strict=True)):
        whole = rows[0] + rows[1]
        groups = [whole[i : i + 8] for i in range(0, 24, 8)]
        assert all(len(set(group)) == 1 for group in groups)
        learned = [number for number, when, *_ in zip(*first["state"]["groups"], strict=True) if when == generation]
        assert [prompts[number] for number in learned] == [group[0] for group in groups]
    assert [row for row, _ in first["state"]["chosen"]] != [0, 1, 2]
