"""Prompts that are likely to teach: the formulas by oracles, what is chosen, and runs that choose."""

import json

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats
from sklearn.linear_model import LogisticRegression

from tests.helpers import (
    config_kwargs,
    conversations,
    largest_change,
    length_reward,
    parameters,
    prompt_dataset,
    tiny_trainer,
)
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig
from trl_capo.errors import UserError
from trl_capo.methods.codapo import CoDaPOTrainer
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer import prompt_selection
from trl_capo.trainer.prompt_selection import (
    Bags,
    PromptSelection,
    count_successes,
    fit_logistic,
    logits_of,
    ngram_features,
    prob_mixed,
)


INFORMATIVE = dict(prompt_selection="informative", prompt_candidates=4)


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def selection(texts, num_prompts=8, candidates=4, exploration=0.1, seed=0) -> PromptSelection:
    return PromptSelection(
        texts, encode, num_prompts=num_prompts, candidates=candidates, exploration=exploration, seed=seed
    )


# Formulas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_generations", [2, 8, 16])
def test_probability_of_a_mixed_group(num_generations):
    rng = np.random.default_rng(num_generations)
    a, b = rng.uniform(0.05, 30, size=(2, 50))
    counts = stats.betabinom(num_generations, a, b)
    expected = 1 - counts.pmf(0) - counts.pmf(num_generations)
    np.testing.assert_allclose(prob_mixed(a, b, num_generations), expected, atol=1e-10)


def test_logistic_regression_of_counts():
    rng = np.random.default_rng(0)
    features = [np.sort(rng.choice(30, rng.integers(1, 8), replace=False)) for _ in range(200)]
    trials = rng.uniform(0.5, 8, 200)
    successes = trials * rng.uniform(size=200)
    dense = np.zeros((200, 30))
    for row, index in zip(dense, features, strict=True):
        row[index] = 1 / np.sqrt(len(index))
    weights = fit_logistic(Bags(features), successes, trials)
    oracle = LogisticRegression(C=1 / prompt_selection.PENALTY, tol=1e-8, max_iter=1000).fit(
        np.vstack([dense, dense]), np.repeat([1, 0], 200), np.concatenate([successes, trials - successes])
    )
    np.testing.assert_allclose(logits_of(weights, Bags(features)), oracle.decision_function(dense), atol=0.02)


def test_successes_follow_the_whole_group():
    rewards = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, np.nan], [1.0, 0.0, np.nan], [0.0, 0.02, 0.0], [1.0, 0.98, 1.0]])
    taught = np.array([False, False, True, True, True])
    assert count_successes(rewards, taught, 0.0, 1.0).tolist() == [0, 2, 1, 1, 2]
    # Equal rewards teach nothing, whatever they are: such a group counts as all right or all wrong.
    assert count_successes(np.full((2, 4), [[0.6], [0.4]]), np.array([False, False]), 0.0, 1.0).tolist() == [4, 0]
    assert count_successes(np.array([[-1.0, -1.0, 1.0, 1.0]]), np.array([True]), -1.0, 1.0).tolist() == [2]


def test_features_are_those_of_the_text():
    assert ngram_features(encode("12+3")).tolist() == ngram_features(encode("12+3")).tolist()
    many = [frozenset(ngram_features(encode(text)).tolist()) for text in ("12+3", "12-3", "3+12", "12+33", "", "1")]
    assert len(set(many)) == len(many)
    assert all(0 <= feature < prompt_selection.NUM_FEATURES for features in many for feature in features)


def test_a_long_text_counts_by_its_end():
    long = encode("x" * 5000 + "what is 12*3?")
    assert ngram_features(long).tolist() == ngram_features(long[-prompt_selection.MAX_TOKENS :]).tolist()


# Choices -------------------------------------------------------------------------------------------------------------


def next_prompts(chooser: PromptSelection, num_generations: int = 8) -> list[int]:
    """The numbers of the next prompts, chosen as the trainer does it."""
    chooser.chosen, chooser.uses = chooser.choose(num_generations), 1
    return [chooser.number_of(chooser._prompts[row]) for row, _ in chooser.chosen]


def test_prompts_are_distinct_and_the_seed_and_the_generation_decide():
    texts = [f"prompt {i}" for i in range(100)]
    first, again, other = selection(texts), selection(texts), selection(texts, seed=1)
    chosen = next_prompts(first)
    assert len(set(chosen)) == 8 and chosen == next_prompts(again) and chosen != next_prompts(other)
    first.update(chosen, np.zeros((8, 4)), np.zeros(8, bool))
    assert next_prompts(first) != chosen


def test_rows_with_one_prompt_take_turns_and_share_what_is_known():
    chooser = selection([f"{i % 40}" for i in range(120)])
    drawn = set()
    for _ in range(60):
        chosen = next_prompts(chooser)
        assert len(set(chosen)) == 8 and all(row % 40 == i for (row, _), i in zip(chooser.chosen, chosen, strict=True))
        drawn |= {row // 40 for row, _ in chooser.chosen}
        chooser.update(chosen, np.eye(8), np.ones(8, bool))
    assert drawn == {0, 1, 2}


def play(chooser: PromptSelection, pass_rates: np.ndarray, generations: int, seed: int = 0) -> np.ndarray:
    """Generations with answers drawn by pass rates; the shares of mixed groups."""
    rng, shares = np.random.default_rng(seed), []
    for _ in range(generations):
        chosen = next_prompts(chooser)
        rewards = (rng.random((len(chosen), 8)) < pass_rates[chosen][:, None]).astype(float)
        taught = rewards.min(axis=1) < rewards.max(axis=1)
        shares.append(taught.mean())
        chooser.update(chosen, rewards, taught)
    return np.array(shares)


def test_what_a_text_says_holds_for_prompts_that_were_never_asked():
    """Hardly a prompt is asked twice, so all that is known comes from other prompts."""
    kinds = np.arange(4000) % 10  # one in ten is neither too easy nor too hard
    texts = [f"{'abcdefghij'[kind]} {i}" for i, kind in enumerate(kinds)]
    pass_rates = np.where(kinds == 3, 0.5, np.where(kinds < 3, 0.0, 1.0))
    chooser = selection(texts, num_prompts=16, candidates=12, exploration=0.125)
    shares = play(chooser, pass_rates, generations=15)
    # Two of sixteen prompts are drawn uniformly, and almost none of them is mixed.
    assert shares[0] < 0.4 and shares[5:].mean() > 0.75
    asked = [group.prompt for group in chooser.groups]
    assert len(set(asked)) > 0.85 * len(asked)


def test_what_a_prompts_own_groups_say_counts_without_any_text():
    pass_rates = np.where(np.arange(64) % 4 == 0, 0.5, 1.0)
    chooser = selection([f"{i}" for i in range(64)], num_prompts=8, candidates=8)
    chooser._encode = lambda text: [7]  # all texts look alike
    shares = play(chooser, pass_rates, generations=60)
    assert shares[-20:].mean() > 0.8


def test_a_share_of_each_generation_stays_uniform():
    """A prompt that never teaches is still asked now and then, and what it would give is measured."""
    pass_rates = np.where(np.arange(64) < 32, 0.5, 0.0)
    chooser = selection([f"{'even' if i < 32 else 'odd'} {i}" for i in range(64)], exploration=0.25)
    asked = []
    for _ in range(40):
        chosen = next_prompts(chooser)
        uniform = chooser.drawn_uniformly(chosen)
        assert sum(uniform) == 2
        asked += [prompt for prompt, is_uniform in zip(chosen, uniform, strict=True) if is_uniform]
        rewards = np.tile(np.arange(8) % 2.0, (8, 1)) * (pass_rates[chosen][:, None] > 0)
        chooser.update(chosen, rewards, rewards.max(axis=1) > 0)
    assert 20 <= sum(prompt >= 32 for prompt in asked) <= 60  # of 80, about half


def test_older_groups_of_a_prompt_count_less():
    chooser = selection([f"{i}" for i in range(32)])
    prior = prompt_selection.PRIOR_COUNT
    for rewards in ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, np.nan, 1.0]):
        chooser.update([5], np.array([rewards]), np.array([np.nanmin(rewards) < np.nanmax(rewards)]))
    a, b = chooser.posterior([5, 6])
    d = prompt_selection.FORGETTING
    mean = chooser._predict([5, 6])
    np.testing.assert_allclose(a, prior * mean + [1 + d * 1 + d**2 * 4, 0])
    np.testing.assert_allclose(b, prior * (1 - mean) + [2 + d * 3, 0])


def test_state_goes_through_json_and_choices_stay_the_same():
    texts = [f"{'easy' if i % 2 else 'hard'} {i}" for i in range(200)]
    pass_rates = np.where(np.arange(200) % 2, 1.0, 0.3)
    one, other = selection(texts), selection(texts)
    play(one, pass_rates, generations=6)
    other.load_state(json.loads(json.dumps(one.state())))
    assert next_prompts(one) == next_prompts(other)
    assert play(one, pass_rates, 3, seed=1).tolist() == play(other, pass_rates, 3, seed=1).tolist()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_too_few_prompts_and_duplicates():
    with pytest.raises(UserError, match=r"draws 32 candidates per generation \(prompt_candidates=4 times 8 prompts\)"):
        selection([f"{i}" for i in range(31)])
    with pytest.raises(UserError, match=r"has 10 distinct prompts \(100 rows, of which 90 repeat a prompt\): lower"):
        selection([f"{i % 10}" for i in range(100)])


def test_no_place_that_is_not_uniform():
    with pytest.raises(UserError, match=r"leaves no prompt to choose: 1 per generation, 1 of them drawn uniformly"):
        selection([f"{i}" for i in range(40)], num_prompts=1)
    with pytest.raises(UserError, match=r"8 of them drawn uniformly \(prompt_exploration=1.0\). Raise"):
        selection([f"{i}" for i in range(40)], exploration=1.0)


def test_prompts_that_are_not_text():
    with pytest.raises(UserError, match="holds something else .*object.* keep images in a column of their own"):
        selection([[{"role": "user", "content": [{"type": "image", "image": object()}]}]] * 40)


def test_another_dataset():
    state = selection([f"{i}" for i in range(40)]).state()
    with pytest.raises(UserError, match="has chosen among other prompts than those of train_dataset"):
        selection([f"{i}" for i in range(41)]).load_state(state)


def test_groups_that_are_remembered_are_limited(monkeypatch):
    monkeypatch.setattr(prompt_selection, "MAX_GROUPS", 20)
    chooser = selection([f"{i}" for i in range(40)])
    play(chooser, np.full(40, 0.5), generations=4)
    assert len(chooser.groups) == 20 and chooser.groups[-1].generation == 3
    monkeypatch.setattr(prompt_selection, "WINDOW", 2)
    play(chooser, np.full(40, 0.5), generations=1)
    assert {group.generation for group in chooser.groups} == {3, 4}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt_selection="greedy"), "prompt_selection must be one of uniform, informative, got 'greedy'"),
        (dict(prompt_candidates=1), "prompt_candidates must be at least 2, got 1"),
        (dict(prompt_exploration=0.0), r"prompt_exploration must lie in \(0, 1\], got 0.0"),
        (dict(prompt_exploration=1.5), r"prompt_exploration must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        CAPOConfig(str(tmp_path), **options)


def test_a_stream_and_a_small_dataset_are_refused(tiny_model, tmp_path):
    stream = prompt_dataset(64).to_iterable_dataset()
    with pytest.raises(UserError, match="cannot look ahead in a stream: load the dataset without streaming"):
        tiny_trainer(CAPOTrainer, tiny_model, tmp_path, dataset=stream, **INFORMATIVE)
    with pytest.raises(UserError, match="train_dataset has 7 distinct prompts: lower prompt_candidates"):
        tiny_trainer(CAPOTrainer, tiny_model, tmp_path, dataset=prompt_dataset(7), **INFORMATIVE)
    with pytest.raises(UserError, match="does not keep the order that shuffle_dataset=False asks for"):
        tiny_trainer(CAPOTrainer, tiny_model, tmp_path, shuffle_dataset=False, **INFORMATIVE)


# Runs ----------------------------------------------------------------------------------------------------------------


class Asked:
    """A reward that records what it was asked to score: odd numbers are always right, even ones by parity."""

    __name__ = "asked"

    def __init__(self):
        self.rows: list[tuple[str, str]] = []

    def __call__(self, prompts, completion_ids, answer, **kwargs):
        texts = [prompt[0]["content"] for prompt in prompts]
        self.rows += list(zip(texts, answer, strict=True))
        return [float(int(text) % 2 or sum(ids) % 2 == 0) for text, ids in zip(texts, completion_ids, strict=True)]


def numbered(num_prompts: int = 64) -> Dataset:
    return conversations(map(str, range(num_prompts)), answer=[f"answer {i}" for i in range(num_prompts)])


def test_rows_of_a_run_are_rows_of_the_dataset_and_evaluation_is_left_alone(tiny_model, tmp_path):
    reward = Asked()
    trainer = tiny_trainer(
        CAPOTrainer,
        tiny_model,
        tmp_path,
        reward,
        numbered(),
        max_steps=3,
        eval_dataset=numbered(4),
        **INFORMATIVE,
    )
    trainer.train()
    trained = reward.rows
    assert len(trained) == 3 * 8 and all(answer == f"answer {text}" for text, answer in trained)
    for i in range(0, len(trained), 4):
        assert len(set(trained[i : i + 4])) == 1  # a group is of one prompt
    assert trainer.selection.generation == 3
    reward.rows = []
    trainer.evaluate()
    assert sorted({text for text, _ in reward.rows}) == ["0", "1", "2", "3"]
    assert trainer.selection.generation == 3
    logged = [entry for entry in trainer.state.log_history if "capo/frac_mixed" in entry]
    assert len(logged) == 3 and all("capo/frac_mixed_uniform" in entry for entry in logged)
    assert not any("eval_capo/frac_mixed_uniform" in entry for entry in trainer.state.log_history)


def test_groups_reach_the_selection(tiny_model, tmp_path):
    reward = Asked()
    trainer = tiny_trainer(GRPO, tiny_model, tmp_path, reward, numbered(), max_steps=2, **INFORMATIVE)
    trainer.train()
    groups = trainer.selection.groups
    assert [group.prompt for group in groups] == [int(text) for text, _ in reward.rows[::4]]
    assert [group.generation for group in groups] == [0, 0, 1, 1] and {group.trials for group in groups} == {4}
    assert all(group.successes == 4 for group in groups if group.prompt % 2)


def test_a_reward_without_weight_teaches_nothing(tiny_model, tmp_path):
    """It is only logged; groups in which it alone differs have no advantages."""

    def always_right(completion_ids, **kwargs):
        return [1.0 for _ in completion_ids]

    rewards = [always_right, length_reward]
    options = dict(reward_weights=[1.0, 0.0], **INFORMATIVE)
    trainer = tiny_trainer(GRPO, tiny_model, tmp_path, rewards, numbered(), **options)
    trainer.train()
    assert [(group.successes, group.trials) for group in trainer.selection.groups] == [(4, 4)] * 2


def test_training_generates_for_mixed_prompts(tiny_model, tmp_path):
    """Prompts that begin with a 1 are always right: three of four."""
    texts = [f"{1 if i % 4 else 2}{i % 10}{i // 10 % 10}{i // 100}" for i in range(400)]

    def reward(prompts, completion_ids, **kwargs):
        easy = [prompt[0]["content"].startswith("1") for prompt in prompts]
        return [float(e or sum(ids) % 2 == 0) for e, ids in zip(easy, completion_ids, strict=True)]

    options = dict(per_device_train_batch_size=64, num_generations=8, max_steps=10, learning_rate=0.0)
    options |= dict(prompt_selection="informative", prompt_candidates=8)
    trainer = tiny_trainer(GRPO, tiny_model, tmp_path, reward, conversations(texts), **options)
    trainer.train()
    mixed = [entry["capo/frac_mixed"] for entry in trainer.state.log_history if "capo/frac_mixed" in entry]
    assert np.mean(mixed[5:]) > 0.7  # uniform prompts give a quarter; one place of eight stays uniform


def test_uniform_is_the_default(tiny_model, tmp_path):
    assert tiny_trainer(CAPOTrainer, tiny_model, tmp_path).selection is None
    assert GroupAdvantageConfig(**config_kwargs(tmp_path)).prompt_selection == "uniform"


def test_a_resumed_run_chooses_as_the_uninterrupted_one(tiny_model, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=0.01, **INFORMATIVE)

    def make(folder):
        reward = Asked()
        return reward, tiny_trainer(CAPOTrainer, tiny_model, tmp_path / folder, reward, numbered(), **options)

    asked, whole = make("whole")
    whole.train()
    again, second = make("whole")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.rows == asked.rows[3 * 8 :]
    assert largest_change(parameters(whole), parameters(second)) <= 1e-5

    other = tiny_trainer(CAPOTrainer, tiny_model, tmp_path / "whole", Asked(), numbered(65), **options)
    with pytest.raises(UserError, match=r"prompts than those of train_dataset. Resume from another checkpoint.$"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_checkpoint_of_uniform_prompts_says_what_is_missing(tiny_model, tmp_path, capsys):
    options = dict(save_strategy="steps", save_steps=1)
    tiny_trainer(CAPOTrainer, tiny_model, tmp_path, dataset=numbered(), max_steps=1, **options).train()
    again = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, dataset=numbered(), max_steps=2, **options, **INFORMATIVE)
    again.train(resume_from_checkpoint=True)
    printed = capsys.readouterr().out
    assert "prompt_selection='uniform': nothing is known of the prompts yet" in printed
    assert again.selection.generation == 1


def test_a_second_generation_of_one_batch_is_the_methods(tiny_model, tmp_path):
    options = dict(per_device_train_batch_size=16, max_steps=4, save_strategy="steps", save_steps=1, **INFORMATIVE)
    reward = Asked()
    trainer = tiny_trainer(CoDaPOTrainer, tiny_model, tmp_path, reward, numbered(), **options)
    trainer.train()
    asked = [[text for text, _ in reward.rows[i : i + 16]] for i in range(0, 64, 16)]
    assert set(asked[1]) <= set(asked[0]) and set(asked[3]) <= set(asked[2])
    assert trainer.selection.generation == 4 and trainer.selection.uses == 2
    # Between the two generations the batch is that of the first one, also after a restart.
    reward = Asked()
    again = tiny_trainer(CoDaPOTrainer, tiny_model, tmp_path, reward, numbered(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [text for text, _ in reward.rows] == sum(asked[1:], [])
