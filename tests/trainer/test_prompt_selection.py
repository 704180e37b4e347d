"""Prompts that are likely to teach: the formulas by oracles, what is chosen, and runs that choose."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from sklearn.linear_model import LogisticRegression

from tests.helpers import config_kwargs, conversations, largest_change, parameters, prompt_dataset, tiny_trainer
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig
from trl_capo.errors import UserError
from trl_capo.methods.codapo import CoDaPOTrainer
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer import prompt_selection
from trl_capo.trainer.prompt_selection import (
    PromptSelection,
    count_successes,
    fit_logistic,
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
    sizes = np.array([len(index) for index in features])
    bags = (
        torch.tensor(np.concatenate(features)),
        torch.tensor(np.concatenate(([0], np.cumsum(sizes)[:-1]))),
        torch.tensor(np.repeat(1 / np.sqrt(sizes), sizes), dtype=torch.float32),
    )
    weights = fit_logistic(bags, torch.tensor(successes).float(), torch.tensor(trials).float()).numpy()
    oracle = LogisticRegression(C=1 / prompt_selection.PENALTY, tol=1e-8, max_iter=1000).fit(
        np.vstack([dense, dense]), np.repeat([1, 0], 200), np.concatenate([successes, trials - successes])
    )
    np.testing.assert_allclose(dense @ weights[:30] + weights[-1], oracle.decision_function(dense), atol=0.02)


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


# Choices -------------------------------------------------------------------------------------------------------------


def test_prompts_are_distinct_and_the_seed_and_the_generation_decide():
    texts = [f"prompt {i}" for i in range(100)]
    first, again, other = selection(texts), selection(texts), selection(texts, seed=1)
    chosen = first.choose(4)
    assert len(set(chosen)) == 8 and chosen == again.choose(4) and chosen != other.choose(4)
    first.update(chosen, np.zeros((8, 4)), np.zeros(8, bool))
    assert first.choose(4) != chosen


def play(chooser: PromptSelection, pass_rates: np.ndarray, generations: int, seed: int = 0) -> np.ndarray:
    """Generations with answers drawn by pass rates; the shares of mixed groups."""
    rng, shares = np.random.default_rng(seed), []
    for _ in range(generations):
        chosen = chooser.choose(8)
        rewards = (rng.random((len(chosen), 8)) < pass_rates[chosen][:, None]).astype(float)
        taught = rewards.min(axis=1) < rewards.max(axis=1)
        shares.append(taught.mean())
        chooser.update(chosen, rewards, taught)
    return np.array(shares)


def test_what_a_text_says_holds_for_prompts_that_were_never_asked():
    """Each prompt is asked once at most, so all that is known comes from other prompts."""
    kinds = np.arange(4000) % 10  # one in ten is neither too easy nor too hard
    texts = [f"{'abcdefghij'[kind]} {i}" for i, kind in enumerate(kinds)]
    pass_rates = np.where(kinds == 3, 0.5, np.where(kinds < 3, 0.0, 1.0))
    chooser = selection(texts, num_prompts=16, candidates=12, exploration=0.125)
    shares = play(chooser, pass_rates, generations=15)
    # Two of sixteen prompts are drawn uniformly, and almost none of them is mixed.
    assert shares[0] < 0.4 and shares[5:].mean() > 0.75


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
        chosen = chooser.chosen = chooser.choose(8)
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
    assert one.choose(8) == other.choose(8)
    assert play(one, pass_rates, 3, seed=1).tolist() == play(other, pass_rates, 3, seed=1).tolist()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_too_few_prompts_and_duplicates():
    with pytest.raises(UserError, match=r"draws 32 candidates a generation \(prompt_candidates=4 times 8 prompts\)"):
        selection([f"{i}" for i in range(31)])
    with pytest.raises(UserError, match=r"has 10 distinct prompts \(100 rows, of which 90 repeat a prompt\): lower"):
        selection([f"{i % 10}" for i in range(100)])
    chooser = selection([f"{i % 40}" for i in range(100)])  # enough: each is drawn as its first row
    assert chooser.rows == list(range(40))


def test_another_dataset():
    state = selection([f"{i}" for i in range(40)]).state()
    with pytest.raises(UserError, match="written with another train_dataset"):
        selection([f"{i}" for i in range(41)]).load_state(state)


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
    with pytest.raises(UserError, match="written with another train_dataset"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_second_generation_of_one_batch_is_the_methods(tiny_model, tmp_path):
    reward = Asked()
    trainer = tiny_trainer(CoDaPOTrainer, tiny_model, tmp_path, reward, numbered(), max_steps=4, **INFORMATIVE)
    trainer.train()
    generations = [{text for text, _ in reward.rows[i : i + 8]} for i in range(0, 32, 8)]
    assert generations[1] <= generations[0] and generations[3] <= generations[2]
    assert trainer.selection.generation == 4 and len(trainer.selection.groups) == 8
