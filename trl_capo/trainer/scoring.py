"""A generation as groups: rewards, labels and confidences of the whole batch, the same on every rank.

After TRL has generated, scored and gathered the rewards, the policy passes over the rows whose log-probs are read,
then the reference over those that need it. Groups may straddle ranks, so per-completion numbers are gathered; each
gather is a collective that every rank calls.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig
from trl.trainer import grpo_trainer
from trl.trainer.utils import use_adapter

from trl_capo.data.rows import with_checked_streams
from trl_capo.errors import UserError
from trl_capo.models.source import explained
from trl_capo.preflight.checks import find_correctness_reward, reward_list
from trl_capo.preflight.prompts import check_prompts
from trl_capo.preflight.trainer import check_trainer
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.fast_step import FastGRPOTrainer
from trl_capo.trainer.groups import RolloutGroups, masked_mean
from trl_capo.trainer.mask import PerplexityMask
from trl_capo.trainer.prompt_selection import selection_of
from trl_capo.trainer.reference import make_room_for_reference_adapter, reference_from, reference_source
from trl_capo.trainer.repack import Batch


# One or several of: a function, a reward model's id, a reward model.
RewardFunctions = Callable | str | PreTrainedModel | list[Callable | str | PreTrainedModel]


class GroupScoringTrainer(FastGRPOTrainer):
    """`FastGRPOTrainer` that presents a generation as `RolloutGroups`, with a reference if one is needed.

    Hooks: `needs_ref`, `needs_correct`, `_rows_needing_logps`, `_rows_needing_ref`, `_sequence_statistics`,
    `_own_passes`.
    """

    args: GroupAdvantageConfig
    config_class = GroupAdvantageConfig
    num_generations_eval: int
    _rewards_per_func: Tensor

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunctions | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config=None,
        peft_config=None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory=None,
    ):
        config = cast(GroupAdvantageConfig, self._checked_args(model, args))
        given = dict(
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        model, prompts_are_checked = check_trainer(
            type(self), model, reward_funcs, config, grpo_trainer.VLLMGeneration, given
        )
        if environment_factory is None:
            streams = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            given |= dict(zip(streams, with_checked_streams(reward_funcs, **streams), strict=True))

        self.selection = selection_of(config, train_dataset, self._encode)
        beta = config.beta
        use_ref = config.ref_ppl_mask or self.needs_ref(config)
        loaded = not isinstance(model, str)
        policy_is_peft = peft_config is not None or (loaded and is_peft_model(model))
        if use_ref and not isinstance(model, str) and is_peft_model(model):
            make_room_for_reference_adapter(model)
        reference = reference_source(model, config, policy_is_peft) if use_ref or beta != 0 else None
        if use_ref and beta == 0:
            config.beta = 1.0  # any nonzero value makes TRL build, wrap and shard its reference model
        self._beta_of_the_loss, self._given = beta, {} if prompts_are_checked else given
        try:
            names = [name for name in (model, reference, *reward_list(reward_funcs)) if isinstance(name, str)]
            with explained(*names), reference_from(reference, config.ref_model_dtype, policy_is_loaded=loaded):
                super().__init__(model, reward_funcs, config, **given)
        finally:
            config.beta = beta

    def _finish_init(self) -> None:
        self.beta = self.args.beta = self._beta_of_the_loss
        if self._given:
            check_prompts(self.model, self.args, {**self._given, "processing_class": self.processing_class})
        self._given = {}
        self._correctness_index = find_correctness_reward(
            self.reward_func_names,
            self.args.correctness_reward,
            needed=self.args.ref_ppl_mask or self.needs_correct(self.args),
        )
        if self._correctness_index is None:
            self.accelerator.print(
                f"ℹ️ {self._name} needs no correctness label, so it trains without the calibration metrics. To log "
                f"them, set correctness_reward to one of {', '.join(self.reward_func_names)}"
                f"{'' if isinstance(self.args, GroupAdvantageConfig) else ' in a GroupAdvantageConfig'}."
            )
        self.mask = PerplexityMask(self.args)

    # Hooks -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def needs_ref(args: GroupAdvantageConfig) -> bool:
        """Whether the method reads `groups.ref_mean_logps`, besides the mask. Called before TRL's constructor."""
        return False

    @classmethod
    def needs_correct(cls, args: GroupAdvantageConfig) -> bool:
        """Whether the method itself reads `groups.correct`. If not, it can train without a label, as TRL does.

        The default is true where advantages are computed from groups.
        """
        return False

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        """Completions whose log-probs the advantages can depend on, shape (P, G), boolean, the same on every rank.

        In training, the others are computed only if TRL needs them. `groups` has no `mean_logps` or `extras` yet.
        """
        return groups.valid

    def _rows_needing_ref(self, groups: RolloutGroups) -> Tensor:
        """Completions whose reference log-probs the method reads, shape (P, G), the same on every rank."""
        return groups.mixed & groups.valid

    def _sequence_statistics(self, per_token_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Extra numbers per completion, each of shape (B,), from log-probs and mask (B, T). Stored in `extras`."""
        return {}

    def _own_passes(self, output: Batch, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Extra numbers per completion, each of shape (B,), that need passes of the method's own. Stored in `extras`.

        Args:
            output: This rank's part of the generation.
            rows: Completions of this rank that `_rows_needing_logps` names, shape (B,), boolean.
            mask: The completions' tokens that count, shape (B, T).
        """
        return {}

    # Groups ----------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    @torch.no_grad()
    def _build_groups(self, output: Batch) -> tuple[RolloutGroups, Tensor, Tensor]:
        """The whole batch as groups, this rank's log-probs under the policy (B, T), and the rows that they cover.

        Log-probs are 0 in rows that the trainer did not compute; scores may come from the sampler instead.
        """
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        rewards_per_func = self._rewards_per_func
        weights = self.reward_weights.to(rewards_per_func.device)
        unscorable = rewards_per_func.isnan().all(dim=1)
        rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)
        if self._correctness_index is None:
            label = torch.full_like(rewards, torch.nan)
        else:
            label = rewards_per_func[:, self._correctness_index]
        correct = (label >= self.args.correct_threshold).float().masked_fill(label.isnan(), torch.nan)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        lengths = self.accelerator.gather(mask.sum(dim=1).float()).view(-1, num_generations)
        groups = RolloutGroups(
            rewards=rewards.view(-1, num_generations),
            rewards_per_func=rewards_per_func.view(-1, num_generations, rewards_per_func.size(1)),
            correct=correct.view(-1, num_generations),
            mean_logps=torch.full_like(lengths, torch.nan),
            lengths=lengths,
            valid=rewards.view(-1, num_generations).isfinite() & (lengths > 0),
            kept=torch.ones_like(lengths, dtype=torch.bool),
        )

        if "old_per_token_logps" in output:
            per_token_logps, scored = output["old_per_token_logps"], torch.ones_like(mask[:, 0], dtype=torch.bool)
        elif self.args.mean_logps_from == "sampler":
            per_token_logps, scored = torch.zeros_like(mask, dtype=torch.float), torch.zeros_like(mask[:, 0]).bool()
        else:
            for_metrics_too = not self.model.training and self._correctness_index is not None
            rows = groups.valid if for_metrics_too else self._rows_needing_logps(groups)
            scored = rows.flatten()[self._local_slice(mask.size(0))]
            per_token_logps = self._policy_logps(output, scored)
        groups = self._with_scores(groups, output, per_token_logps, mask, scored)
        groups = self._with_own_passes(groups, output, mask)
        if self.mask.active or self.needs_ref(self.args):
            ref_mean_logps = self._ref_mean_logps(output, mask, self._rows_for_ref(groups))
            groups = replace(groups, ref_mean_logps=ref_mean_logps.view(-1, num_generations))
        return groups, per_token_logps, scored

    def _rows_for_ref(self, groups: RolloutGroups) -> Tensor:
        rows = self._rows_needing_ref(groups) if self.needs_ref(self.args) else torch.zeros_like(groups.valid)
        if self.mask.active:
            learns = self.mask.estimating and self.model.training
            may_have_advantage = groups.varied | self._rows_needing_logps(groups)
            rows = rows | (groups.valid if learns else groups.valid & may_have_advantage)
        return rows

    def _with_scores(
        self, groups: RolloutGroups, output: Batch, per_token_logps: Tensor, mask: Tensor, scored: Tensor
    ) -> RolloutGroups:
        """The groups with `mean_logps` and `extras`, gathered over the ranks."""
        if self.args.mean_logps_from == "sampler":
            per_token_logps = self._sampler_logps(output)
            mask = mask * per_token_logps.isfinite()  # vLLM occasionally omits a token's log-prob
            per_token_logps = per_token_logps.nan_to_num(nan=0.0)
            scored = torch.ones_like(scored)
        extras = self._sequence_statistics(per_token_logps, mask)
        local = torch.stack([masked_mean(per_token_logps, mask), *(value.float() for value in extras.values())], dim=1)
        local = local.masked_fill(~scored.unsqueeze(1), torch.nan)
        mean_logps, *values = self.accelerator.gather(local).view(*groups.valid.shape, local.size(1)).unbind(dim=2)
        valid = groups.valid
        if self.args.mean_logps_from == "sampler":
            valid = valid & mean_logps.isfinite()
        return replace(groups, mean_logps=mean_logps, valid=valid, extras=dict(zip(extras, values, strict=True)))

    def _with_own_passes(self, groups: RolloutGroups, output: Batch, mask: Tensor) -> RolloutGroups:
        """The groups with what the method's own passes found, gathered over the ranks and added to `extras`."""
        rows = self._rows_needing_logps(groups).flatten()[self._local_slice(mask.size(0))]
        found = self._own_passes(output, rows, mask)
        extras = {
            name: self.accelerator.gather(values.float().masked_fill(~rows, torch.nan)).view(groups.valid.shape)
            for name, values in found.items()
        }
        return replace(groups, extras={**groups.extras, **extras})

    def _sampler_logps(self, output: Batch) -> Tensor:
        if "sampling_per_token_logps" not in output:
            raise UserError(
                "mean_logps_from='sampler', but no log-probs came with the completions: return 'logprobs' from "
                "rollout_func, or set mean_logps_from='policy'."
            )
        return output["sampling_per_token_logps"].float()

    def _ref_mean_logps(self, output: Batch, mask: Tensor, rows: Tensor) -> Tensor:
        """Mean log-probs of all ranks' completions under the reference, shape (P * G,); NaN outside `rows`."""
        rows = rows.flatten()[self._local_slice(mask.size(0))]
        if "ref_per_token_logps" in output:  # beta > 0: TRL's own pass serves the mask too
            per_token_logps = output["ref_per_token_logps"]
        elif self.ref_model is not None:
            per_token_logps = self._logps_of_rows(self.ref_model, output, rows, self._no_grad_batch_size())
        else:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                per_token_logps = self._policy_logps(output, rows)
        return self.accelerator.gather(masked_mean(per_token_logps, mask).masked_fill(~rows, torch.nan))

    def _local_slice(self, num_rows: int) -> slice:
        return slice(self.accelerator.process_index * num_rows, (self.accelerator.process_index + 1) * num_rows)
