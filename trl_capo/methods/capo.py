"""CAPO as a TRL trainer (arXiv 2604.12632): GRPO with pairwise logistic advantages and a reference-perplexity mask.

Everything beyond the paper is opt-in and listed in `docs/method.md`. Where the paper is silent:

- A masked completion has advantage 0 but still counts in its partners' sums (`mask_partners=True` removes it).
- Scores are mean log-probs of the policy that generated the batch, recomputed by the trainer, EOS included.
"""

import math
import textwrap

import numpy as np
import torch
from torch import Tensor

from trl_capo.calibration import metrics
from trl_capo.errors import UserError
from trl_capo.methods.advantages import (
    cross_prompt_advantages,
    pairwise_logistic_advantages,
    reward_only_advantages,
    soft_misranking,
)
from trl_capo.methods.capo_config import CAPOConfig
from trl_capo.methods.gap_scale import GapScale
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups
from trl_capo.trainer.state_values import finite_number, finite_numbers


class CAPOTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with CAPO's advantages; takes a `CAPOConfig` and otherwise the same arguments.

    Example:
        ```python
        from datasets import load_dataset
        from trl.rewards import accuracy_reward

        from trl_capo import CAPOConfig, CAPOTrainer
        from trl_capo.data.conversations import drop_unparsable_gold

        trainer = CAPOTrainer(
            model="Qwen/Qwen2.5-Math-1.5B",
            reward_funcs=accuracy_reward,
            args=CAPOConfig(output_dir="qwen-capo"),
            train_dataset=drop_unparsable_gold(load_dataset("trl-lib/DeepMath-103K", split="train")),
        )
        trainer.train()
        ```
    """

    args: CAPOConfig
    config_class = CAPOConfig
    _tag_names = ["trl", "trl-capo", "capo"]
    _name = "CAPO"
    _paper = {
        "title": "Calibration-Aware Policy Optimization",
        "id": "2604.12632",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2026capo,
                title        = {{Calibration-Aware Policy Optimization}},
                author       = {Wang and Lou and Wu and Wen and Zhang},
                year         = 2026,
                booktitle    = {Annual Meeting of the Association for Computational Linguistics (ACL)},
                pages        = {18375--18390},
                eprint       = {arXiv:2604.12632},
            }"""),
    }

    def _setup_method(self) -> None:
        self._gap_scale = GapScale() if self.args.tau_unit == "gap" else None

    @property
    def tau(self) -> float:
        """Temperature of the logistic loss in nats; NaN as long as its unit is unknown."""
        tau = self.args.tau
        if self.args.tau_end is not None and self.state.max_steps > 0:  # 0 until training starts
            tau *= (self.args.tau_end / tau) ** (self.state.global_step / self.state.max_steps)
        if self._gap_scale is None:
            return tau
        return tau * max(self._gap_scale.median, 1e-6)  # if all scores are equal, the median is 0

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        if self.args.pair_scope == "batch":
            return groups.valid
        labels = self._labels(groups)
        valid = groups.valid & labels.isfinite()
        highest = labels.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
        lowest = labels.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
        return valid & (highest > lowest)  # graded labels may differ although no answer is wrong

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        args = self.args
        labels = self._labels(groups)
        valid = groups.valid & labels.isfinite()
        if self.model.training and self._gap_scale is not None:
            self._gap_scale.update(groups.correct, groups.mean_logps, valid)
        partners = valid & groups.kept if args.mask_partners else valid
        return self._pairwise(labels, groups.mean_logps, partners)

    def _labels(self, groups: RolloutGroups) -> Tensor:
        if not self.args.graded_rewards:
            return groups.correct
        assert self._correctness_index is not None  # CAPO does not start without a label
        rewards = groups.rewards_per_func[..., self._correctness_index]
        outside = rewards[(rewards < -1e-6) | (rewards > 1 + 1e-6)]
        if len(outside) > 0:
            name = self.reward_func_names[self._correctness_index]
            raise UserError(
                f"graded_rewards=True needs rewards in [0, 1], but {name!r} returned {outside[0].item():g}. Rescale "
                "it, or set graded_rewards=False and a correct_threshold."
            )
        return rewards.clamp(0, 1)

    def _pairwise(self, labels: Tensor, mean_logps: Tensor, valid: Tensor) -> Tensor:
        tau = self.tau
        if math.isnan(tau):  # with tau_unit="gap", until the first mixed group
            return torch.zeros_like(mean_logps)
        advantages = self._compare(labels, mean_logps, valid, tau)
        if share := self.args.reward_only_share:
            # At an infinite tau every pair keeps the weight 1/2: GRPO without std, on the scale of this normalisation.
            linear = self._compare(labels, mean_logps, valid, math.inf)
            advantages = (1 - share) * advantages + share * linear
        return advantages / tau if self.args.scale_by_tau else advantages

    def _compare(self, labels: Tensor, mean_logps: Tensor, valid: Tensor, tau: float) -> Tensor:
        normalization = self.args.pair_normalization
        advantages = pairwise_logistic_advantages(labels, mean_logps, tau, valid=valid, normalization=normalization)
        if self.args.pair_scope == "batch":
            advantages = advantages + cross_prompt_advantages(labels, mean_logps, tau, valid=valid)
        return advantages

    def _unmasked_advantages(self, groups: RolloutGroups) -> Tensor:
        """Contribution of the other reward functions: the sum of weight x (reward - group mean), shape (P, G)."""
        advantages = torch.zeros_like(groups.mean_logps)
        if self.args.auxiliary_rewards == "ignore":
            return advantages
        for index, weight in enumerate(self.reward_weights.tolist()):
            if index != self._correctness_index:
                rewards = groups.rewards_per_func[..., index]
                advantages += weight * reward_only_advantages(rewards, valid=groups.valid, scale_rewards="none")
        return advantages

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        if math.isnan(self.tau):
            misranking = torch.full_like(groups.mean_logps[:, 0], torch.nan)
        else:
            misranking = soft_misranking(groups.correct, groups.mean_logps, self.tau, valid=groups.valid)
        return {"soft_misranking": misranking}

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        return {
            "capo/soft_misranking": metrics.nanmean(window["soft_misranking"]),
            "capo/tau": self.tau,
        }

    def _method_state(self) -> dict:
        return {
            "tau": None if math.isnan(self.tau) else self.tau,  # only for people who read the file
            "gaps": self._gap_scale.gaps if self._gap_scale else [],
        }

    def _load_method_state(self, state: dict) -> None:
        finite_number(state, "tau", above=0)
        gaps = finite_numbers(state, "gaps", minimum=0)
        if self._gap_scale is not None:
            self._gap_scale.gaps = gaps
