"""CoDaPO, confidence- and difficulty-adaptive optimization (arXiv 2606.07950): prompts that teach more weigh more.

    d = 1 - share of right answers,    V = 1 - 4 (d - 1/2)^2,    c = exp(mean over the group of s_i)
    w = c V + w0,                      A_i = w (R_i - mean R) / (std R + 1e-6)

where s_i is the mean token log-prob under the policy that sampled. Each prompt has one weight, which is largest for
prompts that are half solved and confidently answered. It cannot change the order of answers to one prompt, which is
what AUC within measures.

Every batch of prompts is used twice. After the first generation, the prompts with w at or above a quantile are kept.
The second generation answers these again: each four times in a row, starting over from the first until the batch is
full. If many weights tie and most prompts are kept, only a quarter of them fit: the first ones.

Source: the released code. CAPO's comparison may predate it and use the workshop version of CoDaPO; this is unverified.
Departures: a completion without a token or a reward takes no part; an answer is right if its reward is at least
`correct_threshold` (in the released code, exactly 1).

Degenerate cases: a prompt whose answers are all right or all wrong has V = 0, w = w0 and advantages 0. If fewer
prompts are mixed than the quantile would keep, the quantile is w0 and all prompts are kept, as in the released code.
"""

import copy
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups
from trl_capo.trainer.state_values import whole_numbers


def prompt_weights(correct: Tensor, mean_logps: Tensor, valid: Tensor, base_weight: float = 0.1) -> Tensor:
    """CoDaPO's weight of each prompt.

    Args:
        correct: 1, 0 or NaN, shape (P, G).
        mean_logps: Mean token log-prob of each completion, shape (P, G); only read in groups with right and wrong
            answers.
        valid: Boolean, shape (P, G).
        base_weight: w0, the weight of a prompt that is always or never solved.

    Returns:
        Shape (P,).

    Source: arXiv 2606.07950.

    Example:
        >>> correct, logps = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> prompt_weights(correct, logps, torch.ones(2, 2, dtype=torch.bool))
        tensor([0.6000, 0.1000])
    """
    valid = valid & correct.isfinite()
    count = valid.sum(dim=1).clamp(min=1)
    accuracy = (correct == 1).logical_and(valid).sum(dim=1) / count
    value = 1 - 4 * (0.5 - accuracy) ** 2
    confidence = (mean_logps.masked_fill(~valid, 0.0).sum(dim=1) / count).exp()
    return torch.where(value > 0, confidence * value, 0.0) + base_weight


def kept_prompts(weights: Tensor, quantile: float) -> list[int]:
    """The prompts for the second generation: those whose weight is at or above a quantile of the batch's weights.

    Example:
        >>> kept_prompts(torch.tensor([0.1, 0.6, 0.1, 0.5]), 0.75)
        [1]
    """
    return (weights >= weights.quantile(quantile)).nonzero().squeeze(1).tolist()


def refilled(kept: list[int], size: int, repeats: int) -> list[int]:
    """A batch of `size` prompts made of the kept ones, each `repeats` times in a row.

    Example:
        >>> refilled([1, 4], 5, repeats=2), refilled([1, 4, 5], 5, repeats=2)
        ([1, 1, 4, 4, 1], [1, 1, 4, 4, 5])
    """
    in_turn = [prompt for prompt in kept for _ in range(repeats)]
    return [in_turn[i % len(in_turn)] for i in range(size)]


@dataclass
class CoDaPOConfig(GroupAdvantageConfig):
    """Configuration of `CoDaPOTrainer`.

    Parameters:
        base_weight (`float`, *optional*, defaults to `0.1`):
            w0, added to every prompt's weight.
        replay (`bool`, *optional*, defaults to `True`):
            Use every batch of prompts twice, so the same number of steps sees half as many different prompts. `False`
            keeps only the weighting.
        replay_quantile (`float`, *optional*, defaults to `0.75`):
            Prompts whose weight is at or above this quantile are answered again.
        replay_repeats (`int`, *optional*, defaults to `4`):
            How many times in a row each of these prompts enters the second batch; 4 in the released code.
    """

    base_weight: float = field(default=0.1, metadata={"help": "Added to every prompt's weight (w0)."})
    replay: bool = field(
        default=True, metadata={"help": "Use every batch twice, the second time only its best prompts."}
    )
    replay_quantile: float = field(
        default=0.75, metadata={"help": "Prompts whose weight is at or above this quantile are answered again."}
    )
    replay_repeats: int = field(
        default=4, metadata={"help": "How many times in a row each of these prompts enters the second batch."}
    )

    def __post_init__(self):
        if not 0 <= self.replay_quantile <= 1:
            raise UserError(f"replay_quantile must lie in [0, 1], got {self.replay_quantile}.")
        if self.replay_repeats < 1:
            raise UserError(f"replay_repeats must be at least 1, got {self.replay_repeats}.")
        super().__post_init__()


class CoDaPOTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with CoDaPO's weights and its second pass over the best prompts; takes a `CoDaPOConfig`."""

    args: CoDaPOConfig
    config_class = CoDaPOConfig
    _tag_names = ["trl", "trl-capo", "codapo"]
    _name = "CoDaPO"
    _replaces_advantages = True
    _paper = {"title": "CoDaPO: Confidence and Difficulty-Adaptive Policy Optimization", "id": "2606.07950"}

    def _setup_method(self) -> None:
        if self.args.replay and isinstance(self.train_dataset, IterableDataset):
            raise UserError("replay=True cannot read a streamed dataset twice: load the dataset, or set replay=False.")
        self._batch: list[dict] = []  # the prompts of the first generation
        self._replayed: list[int] | None = None  # which of them to answer in the second generation, if it is next

    @staticmethod
    def generations_per_batch(args: CoDaPOConfig) -> int:  # type: ignore[override]
        return 2 if args.replay else 1

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        return groups.mixed & groups.valid

    def _choose_prompts(self, inputs: list[dict]) -> list[dict]:
        # The batch is empty if the run resumed between the two generations. The sampler then draws it again.
        if self._replayed is None or not self._batch:
            self._batch = gather_object(inputs)[:: self.num_generations]
        if self._replayed is None:
            return inputs
        chosen = [self._batch[i] for i in refilled(self._replayed, len(self._batch), self.args.replay_repeats)]
        rows = [row for row in chosen for _ in range(self.num_generations)][self._local_slice(len(inputs))]
        return [copy.deepcopy(row) for row in rows]  # tools and rollout functions write into them

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        weights = prompt_weights(groups.correct, groups.mean_logps, groups.valid, self.args.base_weight)
        if self.model.training and self.args.replay:
            self._replayed = kept_prompts(weights, self.args.replay_quantile) if self._replayed is None else None
        advantages = reward_only_advantages(
            groups.rewards, valid=groups.valid, scale_rewards=self.args.scale_rewards, eps=1e-6
        )
        return weights.unsqueeze(1) * advantages

    def _method_state(self) -> dict:
        return {"replayed": self._replayed}

    def _load_method_state(self, state: dict) -> None:
        prompts = self.args.generation_batch_size // self.num_generations
        self._replayed = whole_numbers(state, "replayed", limit=prompts)
