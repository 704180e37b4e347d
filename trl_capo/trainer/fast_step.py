"""TRL's `GRPOTrainer` with a faster step and the same resulting parameters.

After TRL has scored a generation, this trainer cuts it into new micro-batches (`trl_capo.trainer.repack`): it drops
rows without gradient, sorts the rest by length and trims them. Passes without gradient are sorted and trimmed too, run
without dropout, and are deferred until it is known which rows need them.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.rewards import AccuracyReward
from trl_capo.trainer.config import FastGRPOConfig
from trl_capo.trainer.losses import known_losses
from trl_capo.trainer.passes import ShortPassesGRPOTrainer, in_eval_mode
from trl_capo.trainer.repack import (
    Batch,
    Repacking,
    choose_rows,
    concatenate,
    even_cuts,
    has_gradient,
    positions_depend_on_padding,
    repack,
    row_sizes,
    trim,
    what_is_exact,
)


class FastGRPOTrainer(ShortPassesGRPOTrainer):
    """Stock GRPO, faster: takes the arguments of TRL's trainer and trains the same parameters.

    TRL's `loss_type` decides which rows may be dropped or moved. A subclass with its own `_compute_loss` must set
    `args.repack = False` in `_setup` if its loss depends on rows without advantage, or on which rows share a
    micro-batch.

    Hooks: `_setup`, `_after_scoring`, `_logps_from_logits` with `_reads_logits`.
    """

    args: FastGRPOConfig
    config_class = FastGRPOConfig
    _reads_logits = False  # whether the loss takes its log-probs from `_logps_from_logits`
    _generation_inputs: list[dict] | None = None
    _loss_inputs: Batch | None = None
    _defers_old_logps = _old_logps_deferred = False

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._setup()
        self._refuse_what_needs_fused_logits()
        self._repacking = self._choose_repacking()

    @classmethod
    def known_losses(cls) -> list[str]:
        """The values of `loss_type` that the trainer accepts; empty if unknown."""
        return known_losses(cls)

    def _refuse_what_needs_fused_logits(self) -> None:
        unfit = {
            "an image model": self._is_vlm,
            "a mixture of experts with its balancing loss": self.aux_loss_enabled,
            "cast_lm_head_to_fp32": getattr(self.args, "cast_lm_head_to_fp32", False),
        }
        if self._reads_logits and any(unfit.values()):
            names = ", ".join(name for name, used in unfit.items() if used)
            raise UserError(f"{self._name} computes its loss from plain logits, which does not work with {names}.")

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        """What a subclass adds to the constructor. TRL's trainer is already set up."""

    def _after_scoring(self, output: Batch) -> tuple[Tensor, Tensor]:
        """Changes a generation that TRL has scored, in place.

        Returns:
            The policy's log-probs (B, T) where this hook computed them, 0 elsewhere; and the rows that they cover
            (B,), boolean, which are not computed again for the loss.
        """
        mask = output["completion_mask"]
        return torch.zeros(mask.shape, device=mask.device), torch.zeros_like(mask[:, 0], dtype=torch.bool)

    def _logps_from_logits(self, logps: Tensor, entropies: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The tokens' log-probs that the loss uses (B, T), from those of the vocabulary (B, T, V) and the batch.

        Called only if `_reads_logits`. The values should stay the tokens' log-probs, or ratios lose their meaning.
        """
        return logps.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)

    # Around a generation ---------------------------------------------------------------------------------------------

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._start_grading(completions=generated[3], extra_fields=generated[5])
        # If rows without advantage are dropped, most log-probs of the old policy are never read. Which are needed is
        # known only when TRL is done, so its pass is deferred. With vLLM's correction, TRL itself reads them all.
        self._defers_old_logps = (
            self._repacking.prune
            and self.model.training
            and not (self.use_vllm and self.vllm_importance_sampling_correction)
        )
        return generated

    def _start_grading(self, completions: list, extra_fields: dict) -> None:
        """Starts grading in worker processes while TRL computes log-probs (for vLLM's correction or a KL term)."""
        # TRL replaces columns with fields of the same name that a rollout function returns.
        if (
            self._generation_inputs is None
            or "solution" not in self._generation_inputs[0]
            or "solution" in extra_fields
        ):
            return
        for reward_func in self.reward_funcs:
            if isinstance(reward_func, AccuracyReward):
                reward_func.start(completions, [row["solution"] for row in self._generation_inputs])

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._defers_old_logps = False
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs):
        self._generation_inputs = inputs
        self._old_logps_deferred = False
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._generation_inputs = None
            self._defers_old_logps = False
        known_logps, known = self._after_scoring(output)
        if self._old_logps_deferred:
            missing = has_gradient(output) & ~known
            output["old_per_token_logps"] = known_logps + self._policy_logps(output, missing)
        return output

    # Log-probs -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        if self._defers_old_logps:
            self._old_logps_deferred = True
            return None, None, None
        # In evaluation the surrogate equals the log-probs, and batches are larger.
        if self._reads_logits and self._loss_inputs is not None and self.model.training:
            return self._unfused_logps(model, input_ids, attention_mask, logits_to_keep, self._loss_inputs)
        # TRL gives a batch size when it passes over a whole generation for the log-probs alone. It leaves dropout on
        # there, which would make the scores noisy.
        passes_over_all = batch_size is not None and not torch.is_grad_enabled()
        for_logps_alone = not any(kwargs.get(f"compute_{x}") for x in ("entropy", "aux_loss"))
        with in_eval_mode(model) if passes_over_all else nullcontext():
            if passes_over_all and for_logps_alone and self._repacking.trim:
                return self._sorted_logps(model, input_ids, attention_mask, logits_to_keep, batch_size), None, None
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs
            )

    def _unfused_logps(
        self, model, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, inputs: Batch
    ) -> tuple[Tensor, Tensor, None]:
        """Log-probs for the loss and their entropies, from all logits, which TRL's fused head never holds at once."""
        with self.accelerator.autocast():
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                logits_to_keep=logits_to_keep + 1,
            ).logits
        logps = (logits[:, :-1].float() / self.temperature).log_softmax(-1)
        with torch.set_grad_enabled(self._entropy_bonus_enabled):  # otherwise it is only logged
            entropies = -(logps.exp() * logps).sum(-1)
        return self._logps_from_logits(logps, entropies.detach(), inputs), entropies, None

    # Micro-batches ---------------------------------------------------------------------------------------------------

    def _choose_repacking(self) -> Repacking:
        args = self.args
        if not args.repack:
            return Repacking(trim=False, sort=False, prune=False)
        model = self.accelerator.unwrap_model(self.model)
        repacking = what_is_exact(
            loss_type=self.loss_type,
            beta=self.beta,
            top_entropy_quantile=self.top_entropy_quantile,
            entropy_bonus=self._entropy_bonus_enabled,
            aux_loss=self.aux_loss_enabled,
            is_vlm=self._is_vlm,
            padding_matters=positions_depend_on_padding(model),
        )
        if repacking.reason:
            kept = "rows are sorted and trimmed but not dropped" if repacking.sort else "rows are only trimmed"
            kept = kept if repacking.trim else "batches are left as TRL makes them"
            self.accelerator.print(f"repack: {kept}, because {repacking.reason}.")
        return repacking

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before:
            self._buffered_inputs = self._repack(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _repack(self, micro_batches: list[Batch]) -> list[Batch]:
        if not self._repacking.trim:
            return micro_batches
        if not self._repacking.sort:
            return [trim(batch, self.pad_to_multiple_of) for batch in micro_batches]
        # Rows may move only within a block of micro-batches of which every optimizer step takes all or none.
        block_size = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        blocks = [concatenate(micro_batches[i : i + block_size]) for i in range(0, len(micro_batches), block_size)]
        if self._repacking.prune:
            keep = [has_gradient(block) for block in blocks]
        else:
            keep = [torch.ones_like(block["prompt_mask"][:, 0], dtype=torch.bool) for block in blocks]
        # All ranks make the same cuts, because TRL gathers one number per row for its clip metrics. Each position
        # counts as its longest row on any rank: a rank with short rows there must not get more of its long ones.
        num_kept = torch.stack([kept.sum() for kept in keep])
        num_rows = self.accelerator.gather(num_kept.unsqueeze(0)).amax(dim=0).clamp(min=block_size).tolist()
        rows = [choose_rows(block, kept, num) for block, kept, num in zip(blocks, keep, num_rows, strict=True)]
        sizes = torch.cat([row_sizes(block)[index] for block, index in zip(blocks, rows, strict=True)])
        sizes = self.accelerator.gather(sizes.unsqueeze(0)).amax(dim=0)
        rows_of_trl = len(micro_batches[0]["prompt_ids"])
        repacked = []
        for block, index, block_sizes in zip(blocks, rows, sizes.split(num_rows), strict=True):
            cuts = even_cuts(block_sizes.tolist(), block_size)
            repacked += repack(block, index, cuts, rows_of_trl, self.loss_type, self.pad_to_multiple_of)
        return repacked

    def _compute_loss(self, model, inputs):
        self._loss_inputs = inputs
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None
        return loss * inputs["loss_scale"] if "loss_scale" in inputs else loss
