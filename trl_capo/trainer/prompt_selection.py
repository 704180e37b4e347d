"""Chooses the prompts of a generation: those that are likely to teach something.

A group whose rewards are all equal has no advantages, so generating it is wasted. Before a generation, the trainer
draws candidates from the dataset and keeps those that are most likely to be mixed, neither all right nor all wrong:

    P(mixed) = 1 - E[p^G] - E[(1 - p)^G],    p ~ Beta(a, b)
    a = c q + sum_j d^j s_j                  s_j: right answers of G in the prompt's group j, counted from the last
    b = c (1 - q) + sum_j d^j (G - s_j)

The prior's mean q is predicted from the prompt's text: a logistic regression over hashed n-grams of its tokens, fitted
before every generation to the latest groups. Recent groups count more, because the policy changes. No model is called.

Why a prior from the text: most runs see a prompt once or twice, so a posterior by prompt alone would learn nothing in
the first epoch. A prompt's own groups then count twice, in q and by themselves.

Assumes that a prompt's difficulty changes slowly, and that rewards, scaled to [0, 1], are roughly pass rates. Without
any group so far, or with prompts whose text says nothing and that never return, the choice is uniform. A share of each
generation is always drawn uniformly, so that no prompt is given up for good.

Source: MoPPS (arXiv 2507.04632), a Beta posterior per prompt with forgetting. Departures: the prior from the text, the
expected P(mixed) instead of Thompson sampling around a pass rate of 0.5, and the uniform share.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from trl_capo.calibration.metrics import group_fractions
from trl_capo.errors import UserError
from trl_capo.models.messages import text_of
from trl_capo.preflight.selection import check_choice, num_explored, prompt_key
from trl_capo.trainer.config import GroupAdvantageConfig


PRIOR_COUNT = 4.0  # c: the prediction from the text counts as much as this many completions
FORGETTING = 0.5  # d: what a group counts less with every later group of the same prompt
DECAY = 0.97  # what a group counts less for the prediction with every later generation
WINDOW, MAX_GROUPS = 100, 4096  # generations, and groups, that the prediction is fitted to at most
FEATURE_BITS = 14
NUM_FEATURES = 2**FEATURE_BITS
MAX_TOKENS = 512  # of a prompt, its last ones
PENALTY = 1.0


@dataclass(frozen=True)
class Group:
    """What is remembered of a group: which prompt (its number among the distinct ones), and how it went."""

    prompt: int
    generation: int
    successes: int
    trials: int


def selection_of(
    args: GroupAdvantageConfig,
    train_dataset: Dataset | IterableDataset | None,
    encode: Callable[[str], list[int]],
) -> "PromptSelection | None":
    """The selection that a configuration asks for; None for uniform prompts."""
    if args.prompt_selection == "uniform" or not isinstance(train_dataset, Dataset):
        return None
    return PromptSelection(
        train_dataset["prompt"],
        encode,
        num_prompts=args.generation_batch_size // args.num_generations,
        candidates=args.prompt_candidates,
        exploration=args.prompt_exploration,
        seed=args.seed,
    )


class PromptSelection:
    """Chooses prompts for each training generation and learns from its groups.

    Args:
        prompts: The dataset's prompts, strings or lists of messages. Rows with one prompt share what is known of it;
            if it is chosen, one of them is drawn.
        encode: Token ids of a text.
        num_prompts: Prompts per generation, P.
        candidates: Candidates drawn for each prompt that is kept.
        exploration: Share of each generation that is drawn uniformly, rounded up to a whole prompt.
        seed: Seed of the draws.

    Raises:
        UserError: There are fewer distinct prompts than candidates, or no place that is not drawn uniformly.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        encode: Callable[[str], list[int]],
        *,
        num_prompts: int,
        candidates: int,
        exploration: float,
        seed: int,
    ):
        self.num_prompts, self.num_candidates, self.seed = num_prompts, candidates * num_prompts, seed
        self.num_explored = num_explored(exploration, num_prompts)
        self._prompts, self._encode = prompts, encode
        self._number: dict[bytes, int] = {}  # of a prompt among the distinct ones
        self.first_rows: list[int] = []  # where each distinct prompt first stands in the dataset
        self._more_rows: dict[int, list[int]] = {}  # where else, for those that repeat
        for row, prompt in enumerate(prompts):
            number = self._number.setdefault(prompt_key(prompt), len(self.first_rows))
            if number == len(self.first_rows):
                self.first_rows.append(row)
            else:
                self._more_rows.setdefault(number, []).append(row)
        check_choice(
            len(self.first_rows),
            len(prompts),
            num_prompts=num_prompts,
            candidates=candidates,
            exploration=exploration,
        )
        self.fingerprint = hashlib.sha256(b"".join(self._number)).hexdigest()[:16]
        self.generation = 0
        self.groups: list[Group] = []  # of the window
        self.chosen: list[tuple[int, bool]] = []  # rows of the current prompts, and which were drawn uniformly
        self.uses = 0  # how many generations have answered them
        self.low, self.high = 0.0, 1.0  # lowest and highest reward so far
        self._counts: dict[int, tuple[float, float]] = {}  # right and wrong answers of a prompt, discounted
        self._features: dict[int, np.ndarray] = {}

    def number_of(self, prompt: Any) -> int:
        """Number of a prompt among the distinct ones; -1 if the dataset does not have it."""
        return self._number.get(prompt_key(prompt), -1)

    def choose(self, num_generations: int) -> list[tuple[int, bool]]:
        """Rows of P distinct prompts for a generation, and whether each was drawn uniformly; in random order."""
        rng = np.random.default_rng([self.seed, self.generation])
        candidates = rng.choice(len(self.first_rows), self.num_candidates, replace=False)
        explored, others = candidates[: self.num_explored], candidates[self.num_explored :]
        if self.groups:  # else all candidates are alike
            likely = prob_mixed(*self.posterior(others), num_generations)
            others = others[np.argsort(-likely, kind="stable")]
        kept = np.concatenate([explored, others[: self.num_prompts - self.num_explored]]).tolist()
        rows = [int(rng.choice([self.first_rows[number], *self._more_rows.get(number, [])])) for number in kept]
        order = rng.permutation(self.num_prompts).tolist()
        return [(rows[i], i < self.num_explored) for i in order]

    def drawn_uniformly(self, prompts: Sequence[int]) -> list[bool]:
        """Which of a generation's prompts were drawn uniformly for it, shape (P,)."""
        uniform = {self.number_of(self._prompts[row]) for row, is_uniform in self.chosen if is_uniform}
        return [self.uses == 1 and prompt in uniform for prompt in prompts]

    def posterior(self, prompts: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parameters a and b of the pass rates' Beta distributions, each of shape (len(prompts),)."""
        mean = self._predict(prompts)
        right, wrong = np.array([self._counts.get(int(prompt), (0.0, 0.0)) for prompt in prompts]).T
        return PRIOR_COUNT * mean + right, PRIOR_COUNT * (1 - mean) + wrong

    def update(self, prompts: Sequence[int], rewards: np.ndarray, taught: np.ndarray) -> None:
        """Learn from a generation's groups.

        Args:
            prompts: Their numbers, shape (P,); -1 is passed over.
            rewards: What decides whether a group teaches something: labels or rewards, NaN = does not count, (P, G).
            taught: Groups whose rewards differ, shape (P,), boolean.
        """
        finite = rewards[np.isfinite(rewards)]
        self.low, self.high = float(finite.min(initial=self.low)), float(finite.max(initial=self.high))
        trials = np.isfinite(rewards).sum(axis=1)
        successes = count_successes(rewards, taught, self.low, self.high)
        for prompt, right, count in zip(prompts, successes.tolist(), trials.tolist(), strict=True):
            if prompt >= 0 and count > 0:
                self.groups.append(Group(prompt, self.generation, right, count))
                before = self._counts.get(prompt, (0.0, 0.0))
                self._counts[prompt] = (FORGETTING * before[0] + right, FORGETTING * before[1] + count - right)
        self.generation += 1
        window = [group for group in self.groups if group.generation >= self.generation - WINDOW]
        self.groups = window[-MAX_GROUPS:]

    def metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """Share of mixed groups among uniformly drawn prompts, from the arrays of a logging window."""
        if "drawn_uniformly" not in window:
            return {}
        uniform = window["drawn_uniformly"].astype(bool)
        fractions = group_fractions(window["correct"][uniform], valid=window["valid"][uniform].astype(bool))
        return {"capo/frac_mixed_uniform": fractions["frac_mixed"]}

    # State -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint keeps; the posterior follows from it exactly."""
        return {
            "prompts": self.fingerprint,
            "generation": self.generation,
            "groups": [list(column) for column in zip(*map(astuple, self.groups), strict=True)],
            "counts": [list(self._counts), *([counts[i] for counts in self._counts.values()] for i in range(2))],
            "chosen": [list(pair) for pair in self.chosen],
            "uses": self.uses,
            "rewards": [self.low, self.high],
        }

    def load_state(self, state: dict) -> None:
        """Restore `state`.

        Raises:
            UserError: It was saved with other prompts.
        """
        if state["prompts"] != self.fingerprint:
            raise UserError(
                "prompt_selection='informative' has chosen among other prompts than those of train_dataset"
            )
        self.generation, self.uses = state["generation"], state["uses"]
        self.groups = [Group(*group) for group in zip(*state["groups"], strict=True)]
        numbers, right, wrong = state["counts"]
        self._counts = dict(zip(numbers, zip(right, wrong, strict=True), strict=True))
        self.chosen = [(row, is_uniform) for row, is_uniform in state["chosen"]]
        self.low, self.high = state["rewards"]

    # Prediction from the text ----------------------------------------------------------------------------------------

    def _predict(self, prompts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted pass rates, shape (len(prompts),)."""
        known = {group.prompt for group in self.groups}
        self._features = {number: row for number, row in self._features.items() if number in known}
        counts = np.array([[group.successes, group.trials, group.generation] for group in self.groups], dtype=float)
        weight = DECAY ** (self.generation - counts[:, 2])
        bags = self._bags([group.prompt for group in self.groups])
        weights = fit_logistic(bags, counts[:, 0] * weight, counts[:, 1] * weight)
        return 1 / (1 + np.exp(-logits_of(weights, self._bags(prompts))))

    def _bags(self, prompts: Iterable[int]) -> "Bags":
        return Bags([self._features_of(int(prompt)) for prompt in prompts])

    def _features_of(self, prompt: int) -> np.ndarray:
        if prompt not in self._features:
            content = self._prompts[self.first_rows[prompt]]
            messages = [content] if isinstance(content, str) else [message.get("content") for message in content]
            self._features[prompt] = ngram_features(self._encode("\n".join(map(text_of, messages))))
        return self._features[prompt]


def prob_mixed(a: np.ndarray, b: np.ndarray, num_generations: int) -> np.ndarray:
    """Probability that a group is neither all right nor all wrong, with a pass rate from Beta(a, b).

    Args:
        a: Positive, shape (N,).
        b: Positive, shape (N,).
        num_generations: Completions per group, G.

    Returns:
        1 - E[p^G] - E[(1 - p)^G], shape (N,), in [0, 1].

    Example:
        >>> prob_mixed(np.array([1.0]), np.array([1.0]), 2).round(4)  # 1 - 1/3 - 1/3, for a uniform pass rate
        array([0.3333])
    """
    steps = np.arange(num_generations)
    total = np.asarray(a + b)[:, None] + steps
    all_right = ((np.asarray(a)[:, None] + steps) / total).prod(axis=1)
    all_wrong = ((np.asarray(b)[:, None] + steps) / total).prod(axis=1)
    return 1 - all_right - all_wrong


def count_successes(rewards: np.ndarray, taught: np.ndarray, low: float, high: float) -> np.ndarray:
    """Right answers of each group; of graded rewards, the count with the same mean.

    A group counts as all right or all wrong exactly if it taught nothing, whatever its mean.

    Args:
        rewards: Labels or rewards, NaN = unscorable, shape (P, G).
        taught: Groups whose rewards differ, shape (P,), boolean.
        low: The lowest reward, which counts as wrong.
        high: The highest reward, which counts as right.

    Returns:
        Shape (P,), int.

    Example:
        >>> graded = np.array([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.1, 0.0], [1.0, 1.0, 0.0, np.nan]])
        >>> count_successes(graded, np.array([False, True, True]), low=0.0, high=1.0)
        array([4, 1, 2])
    """
    valid = np.isfinite(rewards)
    trials = valid.sum(axis=1)
    share = (np.where(valid, rewards, low).sum(axis=1) - low * (rewards.shape[1])) / (high - low)
    between = np.clip(np.rint(share), 1, np.maximum(trials - 1, 1))
    return np.where(taught, between, np.where(share >= trials / 2, trials, 0)).astype(int)


def ngram_features(ids: list[int]) -> np.ndarray:
    """Hashed features of a text: its distinct n-grams of one to three tokens, and one that all texts have.

    Returns:
        Sorted, uint16, each below `NUM_FEATURES`. Of a long text only the last `MAX_TOKENS` tokens count.
    """
    ngrams = tokens = np.asarray(ids[-MAX_TOKENS:], dtype=np.uint64)
    hashed = [np.zeros(1, dtype=np.uint64)]
    with np.errstate(over="ignore"):
        for n in range(3):
            hashed.append((ngrams + np.uint64(n)) * np.uint64(0x9E3779B97F4A7C15))
            ngrams = ngrams[:-1] * np.uint64(0x100000001B3) + tokens[n + 1 :]
    return np.unique(np.concatenate(hashed) >> np.uint64(64 - FEATURE_BITS)).astype(np.uint16)


class Bags:
    """Features of N texts, one after the other; each has the value 1 / sqrt(number of features of its text).

    Args:
        rows: Features of each text, at least one.
    """

    def __init__(self, rows: list[np.ndarray]):
        self.sizes = np.array([len(row) for row in rows])
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)[:-1]))
        self.features = np.concatenate(rows).astype(np.int64)
        self.values = np.repeat(self.sizes**-0.5, self.sizes)


def logits_of(weights: np.ndarray, bags: Bags) -> np.ndarray:
    """Sum of each text's weights times values, plus the intercept, the last weight; shape (N,)."""
    return np.add.reduceat(weights[bags.features] * bags.values, bags.starts) + weights[-1]


def fit_logistic(bags: Bags, successes: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Logistic regression of binomial counts with an L2 penalty; the last weight is the unpenalised intercept.

    Args:
        bags: Features of N observations.
        successes: Weighted successes, shape (N,).
        trials: Weighted trials, shape (N,).

    Returns:
        Weights, shape (`NUM_FEATURES` + 1,).
    """
    weights = torch.zeros(NUM_FEATURES + 1, dtype=torch.float64)
    # Always the same start: a resumed run chooses the same prompts.
    weights[-1] = torch.logit(torch.tensor(successes.sum() / trials.sum()), eps=1e-3)
    optimizer = torch.optim.LBFGS([weights], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        now = weights.numpy()
        logits, penalised = logits_of(now, bags), now[:-1]
        residuals = trials / (1 + np.exp(-logits)) - successes
        gradient = np.bincount(bags.features, bags.values * np.repeat(residuals, bags.sizes), NUM_FEATURES + 1)
        weights.grad = torch.from_numpy(gradient + np.append(PENALTY * penalised, residuals.sum()))
        fit = (trials * np.logaddexp(0, logits) - successes * logits).sum()
        return torch.tensor(fit + 0.5 * PENALTY * (penalised**2).sum())

    optimizer.step(closure)
    return weights.numpy()
