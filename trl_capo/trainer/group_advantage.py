"""The seam: the one file that knows TRL's private methods (tested with TRL 1.16).

TRL computes advantages inline and offers no hook for them. `GroupAdvantageTrainer` lets TRL do all its work, then
shows the whole batch as groups to one pure function and puts the result in place of TRL's advantages. Nothing of TRL
is copied: every method here calls `super()` and changes one thing. A method subclasses it and defines
`_compute_advantages(groups) -> (P, G)`; used as it is, it is GRPO with calibration metrics. Log-probs that need no
gradient are taken without dropout, which TRL leaves on.

Order of a generation, the same on every rank since each gather is a collective: TRL generates, scores and gathers the
rewards; the policy passes over the rows whose log-probs the method reads, then the reference over those that need it;
then advantages are computed from global tensors, identically on every rank, and each rank keeps its slice. Groups may
straddle ranks. Last, the generation is cut into micro-batches anew (`trl_capo.trainer.repack`).
"""

import inspect
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HTTPError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainerState
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler, get_config_model_id, use_adapter

from trl_capo.calibration import metrics
from trl_capo.data.rows import with_checked_streams
from trl_capo.errors import UserError
from trl_capo.files import write_json, write_text
from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.source import explained
from trl_capo.preflight.checks import (
    check_same_checkpoint,
    find_correctness_reward,
    reward_list,
    steps_between_generations,
)
from trl_capo.preflight.prompts import check_prompts
from trl_capo.preflight.trainer import check_trainer
from trl_capo.publish.card import complete_card, example_question, forget_calibration
from trl_capo.publish.hub import check_completions_repo, check_private, guarded_uploads, push_command, wants_private
from trl_capo.redact import mask
from trl_capo.rewards import AccuracyReward
from trl_capo.trainer.checkpoints import (
    MANIFEST,
    STATE_FILE,
    Run,
    begin_run,
    checkpoint_step,
    last_complete_checkpoint,
    remove_old_checkpoints,
    write_manifest,
)
from trl_capo.trainer.config import GroupAdvantageConfig, without_secrets
from trl_capo.trainer.finite import check_gradient_norm, check_parameters
from trl_capo.trainer.idle import IdleWatch
from trl_capo.trainer.reference import make_room_for_reference_adapter, reference_source
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
    take,
    trim,
    what_is_exact,
)
from trl_capo.trainer.resume import (
    StreamPosition,
    agree,
    check_best,
    checkpoint_named,
    newest_checkpoint,
    what_differs,
)
from trl_capo.trainer.resume_options import changed_options, hyperparameters, recorded_options, restore_hyperparameters
from trl_capo.trainer.state_values import read_state, truth, whole_number


# One or several of: a function, the id of a reward model, a reward model.
RewardFunctions = Callable | str | PreTrainedModel | list[Callable | str | PreTrainedModel]

REFERENCE_DIR = "reference"

# Inputs of a vision-language model: what TRL's forward takes beside tokens. They are not one row a completion, so such
# batches pass the reference whole.
_FORWARD = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
MULTIMODAL_INPUTS = [p.name for p in _FORWARD.parameters.values() if p.default is None and p.name != "batch_size"]

# What a text model's forward needs of a batch.
TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


@dataclass(frozen=True)
class RolloutGroups:
    """One generation over all ranks, as groups: P prompts with G completions each. All tensors are detached.

    Attributes:
        rewards: Weighted sum of the reward functions, shape (P, G). NaN = no function could score it.
        rewards_per_func: Each reward function's output, unweighted, shape (P, G, K).
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean log-prob of the unmasked completion tokens (EOS included) under the policy that generated
            them, in nats, at the sampling temperature, shape (P, G). NaN without such a token, and where it was not
            computed: see `_rows_needing_logps`.
        lengths: Number of unmasked completion tokens, shape (P, G).
        valid: Scorable and with at least one unmasked token, shape (P, G), boolean. A fully masked (truncated) row
            would have a mean log-prob of 0, the surest of all, were it not for this.
        ref_mean_logps: `mean_logps` under the reference, NaN where it was not computed; None without a reference.
        extras: What `_sequence_statistics` returned, each of shape (P, G); NaN where `mean_logps` was not computed.
    """

    rewards: Tensor
    rewards_per_func: Tensor
    correct: Tensor
    mean_logps: Tensor
    lengths: Tensor
    valid: Tensor
    ref_mean_logps: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mixed(self) -> Tensor:
        """Groups with at least one correct and one wrong valid completion, shape (P, 1), boolean."""
        correct = ((self.correct == 1) & self.valid).any(dim=1, keepdim=True)
        wrong = ((self.correct == 0) & self.valid).any(dim=1, keepdim=True)
        return correct & wrong


class GroupAdvantageTrainer(GRPOTrainer):
    """`GRPOTrainer` whose advantages may depend on whole groups. Takes the same arguments.

    Hooks for a method, all optional: `_compute_advantages`, `_setup_method`, `needs_ref`, `needs_correct`,
    `_rows_needing_logps`, `_rows_needing_ref`, `_sequence_statistics`, `_token_advantages`, `_choose_prompts`,
    `_logps_from_logits`, `_calibration_arrays`, `_calibration_metrics`, `_method_state`, `_load_method_state`.

    What may be dropped and moved is decided by TRL's `loss_type`. So a method with a `_compute_loss` of its own sets
    `args.repack = False` in `_setup_method` if rows without advantage matter in it, or which rows share a micro-batch.

    Raises:
        TypeError: `args` is not of `config_class` (GRPO through the seam also takes TRL's own `GRPOConfig`).
        ValueError: Bad input that would only show during training: see `trl_capo.preflight` and `trl_capo.preflight.checks`.
    """

    config_class = GroupAdvantageConfig
    _tag_names = ["trl", "trl-capo", "grpo"]
    _defines_method = ("_name", "_compute_advantages", "_compute_loss", "_token_advantages", "_logps_from_logits")
    _run = Run()  # a new one with each training that starts from zero
    _resumed = None  # the checkpoint that a training continues from
    _reads_logits = False  # whether the loss takes its log-probs from `_logps_from_logits`

    # Before a generation. Of the class, for TRL's methods may be called on a trainer that was built without us.
    _generation_inputs = _loss_inputs = None
    _defers_old_logps = _old_logps_deferred = False
    _repacking = Repacking(trim=False, sort=False, prune=False)

    def __init_subclass__(cls, **kwargs):
        """A method that names no paper of its own has none: its card must not credit that of its parent."""
        super().__init_subclass__(**kwargs)
        parent = next(base for base in cls.__mro__[1:] if issubclass(base, GroupAdvantageTrainer))
        if any(getattr(cls, name) is not getattr(parent, name) for name in cls._defines_method):
            cls._name = cls.__dict__.get("_name", cls.__name__.removesuffix("Trainer"))
            cls._paper = cls.__dict__.get("_paper", {})

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
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        self._check_config(args)
        check_completions_repo(args)
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
            type(self), model, reward_funcs, args, grpo_trainer.VLLMGeneration, given
        )
        if environment_factory is None:
            streams = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            given |= dict(zip(streams, with_checked_streams(reward_funcs, **streams), strict=True))

        beta = args.beta
        use_ref = self.needs_ref(args)
        loaded = not isinstance(model, str)
        policy_is_peft = peft_config is not None or (loaded and is_peft_model(model))
        if use_ref and loaded and is_peft_model(model):
            make_room_for_reference_adapter(model)
        reference = reference_source(model, args, policy_is_peft) if use_ref or beta != 0 else None
        if use_ref and beta == 0:
            args.beta = 1.0  # any nonzero value makes TRL build, wrap and shard its reference model
        try:
            names = [name for name in (model, reference, *reward_list(reward_funcs)) if isinstance(name, str)]
            with explained(*names), _reference_from(reference, args.ref_model_dtype, policy_is_loaded=loaded):
                super().__init__(model, reward_funcs, args, **given)
        finally:
            args.beta = beta
        self.beta = beta
        if not prompts_are_checked:
            check_prompts(self.model, args, {**given, "processing_class": self.processing_class})
        # Saved with the model, so that whoever asks it later renders the prompts that it was trained on.
        self.processing_class = with_defaults(self.processing_class, self.chat_template_kwargs)

        self._correctness_index = find_correctness_reward(
            self.reward_func_names, args.correctness_reward, needed=self.needs_correct(args)
        )
        if self._correctness_index is None:
            self.accelerator.print(
                f"ℹ️ {self._name} needs no label of what is correct, so it trains without the calibration metrics. For "
                f"these, set correctness_reward to one of {', '.join(self.reward_func_names)}"
                f"{'' if isinstance(args, GroupAdvantageConfig) else ' in a GroupAdvantageConfig'}."
            )
        self._idle_watch = IdleWatch()
        self._rewards_per_func = None
        self._window = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._num_eval_prompts = None
        self._eval_prefix = "eval"
        self._setup_method()
        unfit = {
            "an image model": self._is_vlm,
            "a mixture of experts with its balancing loss": self.aux_loss_enabled,
            "cast_lm_head_to_fp32": getattr(args, "cast_lm_head_to_fp32", False),
        }
        if self._reads_logits and any(unfit.values()):
            names = ", ".join(name for name, there in unfit.items() if there)
            raise ValueError(f"{self._name} takes its loss from plain logits, which does not work with {names}.")
        self._repacking = self._choose_repacking()
        if args.sync_ref_model and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.accelerator.print(
                "⚠️ sync_ref_model: the moving reference is not saved under FSDP or DeepSpeed. A resumed run starts it "
                "again from the initial model."
            )

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _setup_method(self) -> None:
        """What a method adds to the constructor; everything else of the trainer is there."""

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor | None:
        """Advantages of a generation, shape (P, G). None keeps those that TRL computed."""
        return None

    @staticmethod
    def needs_ref(args: GroupAdvantageConfig) -> bool:
        """Whether the method reads `groups.ref_mean_logps`. Called before the parent's constructor."""
        return False

    @classmethod
    def needs_correct(cls, args: GroupAdvantageConfig) -> bool:
        """Whether the method reads `groups.correct`: if not, it trains without a label, as TRL does."""
        return cls._compute_advantages is not GroupAdvantageTrainer._compute_advantages

    @staticmethod
    def generations_per_batch(args: GroupAdvantageConfig) -> int:
        """How often in a row the sampler draws the same prompts."""
        return 1

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        """Completions whose log-probs the advantages can depend on, shape (P, G), boolean, the same on every rank.

        In training the others are not computed, unless TRL does; `groups` has no `mean_logps` and `extras` yet.
        """
        if type(self)._compute_advantages is GroupAdvantageTrainer._compute_advantages:
            return groups.mixed & groups.valid  # the advantages are TRL's: this is for the metrics
        return groups.valid

    def _rows_needing_ref(self, groups: RolloutGroups) -> Tensor:
        """Completions whose reference log-probs can matter, shape (P, G), boolean. Must be the same on every rank."""
        return groups.mixed & groups.valid

    def _sequence_statistics(self, per_token_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """More numbers a completion, each of shape (B,), from its log-probs and mask (B, T); end up in `extras`."""
        return {}

    def _token_advantages(self, advantages: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This rank's advantages (B,) as they enter the loss; a method may make them (B, T)."""
        return advantages

    def _choose_prompts(self, inputs: list[dict]) -> list[dict]:
        """This rank's rows of a training generation, each prompt `num_generations` times; as many must come back."""
        return inputs

    def _logps_from_logits(self, logps: Tensor, entropies: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """What the loss takes for the tokens' log-probs (B, T), from those of the vocabulary (B, T, V) and the batch.

        Only called where `_reads_logits`. Values should stay the tokens' log-probs, or ratios lose their meaning.
        """
        return logps.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)

    def _method_state(self) -> dict:
        """What must survive a restart besides the model, as JSON. Equal on every rank."""
        return {}

    def _load_method_state(self, state: dict) -> None:
        """Restores what `_method_state` returned when the checkpoint was written."""

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        """What the metrics need to keep of a generation; each array starts with the prompt axis."""
        return {
            "correct": groups.correct,
            # What else is scored in training depends on method and settings, and curves should be comparable.
            "mean_logps": groups.mean_logps.masked_fill(self.model.training & ~groups.mixed, torch.nan),
            "valid": groups.valid,
            "in_mixed_group": groups.mixed & groups.valid,
        }

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics over the logging window, from its `_calibration_arrays`, concatenated along the prompts."""
        correct, mean_logps = window["correct"], window["mean_logps"]
        valid = window["valid"].astype(bool) & ~np.isnan(correct)
        in_mixed_group = window["in_mixed_group"].astype(bool)
        scored = valid & np.isfinite(mean_logps)
        fractions = metrics.group_fractions(correct, valid=valid)
        return {
            "capo/auc_within": metrics.auc_within(correct, mean_logps, valid=scored),
            "capo/auc_pooled": metrics.auc_pooled(correct, mean_logps, valid=scored),
            **{f"capo/{name}": value for name, value in fractions.items()},
            "capo/frac_unscorable": 1.0 - float(valid.mean()),
            "capo/ppl_correct": metrics.perplexity(mean_logps[in_mixed_group & (correct == 1)]),
            "capo/ppl_wrong": metrics.perplexity(mean_logps[in_mixed_group & (correct == 0)]),
        }

    # Around a generation ---------------------------------------------------------------------------------------------

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._start_grading(completions=generated[3], extra_fields=generated[5])
        # Where rows without advantage are dropped, most log-probs of the old policy are never read. Which ones is
        # known when TRL is done, so its own pass is put off; under vLLM's correction TRL reads them all itself.
        self._defers_old_logps = (
            self._repacking.prune
            and self.model.training
            and not (self.use_vllm and self.vllm_importance_sampling_correction)
        )
        return generated

    def _start_grading(self, completions: list, extra_fields: dict) -> None:
        """Lets worker processes grade while TRL computes log-probs (under vLLM's correction or a KL term)."""
        # TRL replaces columns by what a rollout function returned under their names.
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
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        self._check_parameters()  # sampling from such weights would crash, and say less
        if self.model.training:
            inputs = self._choose_prompts(inputs)
        self._generation_inputs = inputs
        self._old_logps_deferred = False
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._generation_inputs = None
            self._defers_old_logps = False
        groups, per_token_logps, scored = self._build_groups(output)
        advantages = self._compute_advantages(groups)
        if advantages is not None:
            self._check_advantages(advantages, groups)
            if self.model.training:
                self._watch_for_idleness(advantages, groups)
            self._replace_advantages(output, advantages.flatten())
        output["advantages"] = self._token_advantages(output["advantages"], output)
        if self._old_logps_deferred:
            missing = has_gradient(output) & ~scored
            output["old_per_token_logps"] = per_token_logps + self._policy_logps(output, missing)
        if self._correctness_index is None:
            return output
        window = self._window["train" if self.model.training else "eval"]
        for name, array in self._calibration_arrays(groups).items():
            window[name].append(array.float().cpu().numpy())
        return output

    @torch.no_grad()
    def _build_groups(self, output: Batch) -> tuple[RolloutGroups, Tensor, Tensor]:
        """The whole batch as groups; this rank's log-probs under the policy (B, T), and rows they were computed for.

        A row's log-probs are 0 if they were not computed by the trainer; scores may come from the sampler instead.
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
        if self.needs_ref(self.args):
            ref_mean_logps = self._ref_mean_logps(output, mask, self._rows_needing_ref(groups))
            groups = replace(groups, ref_mean_logps=ref_mean_logps.view(-1, num_generations))
        return groups, per_token_logps, scored

    def _with_scores(
        self, groups: RolloutGroups, output: Batch, per_token_logps: Tensor, mask: Tensor, scored: Tensor
    ) -> RolloutGroups:
        """The groups with `mean_logps` and `extras`, gathered over the ranks."""
        if self.args.mean_logps_from == "sampler":
            per_token_logps = self._sampler_logps(output)
            mask = mask * per_token_logps.isfinite()  # vLLM leaves a token's log-prob out now and then
            per_token_logps = per_token_logps.nan_to_num(nan=0.0)
            scored = torch.ones_like(scored)
        extras = self._sequence_statistics(per_token_logps, mask)
        local = torch.stack(
            [_masked_mean(per_token_logps, mask), *(value.float() for value in extras.values())], dim=1
        )
        local = local.masked_fill(~scored.unsqueeze(1), torch.nan)
        mean_logps, *values = self.accelerator.gather(local).view(*groups.valid.shape, local.size(1)).unbind(dim=2)
        valid = groups.valid
        if self.args.mean_logps_from == "sampler":
            valid = valid & mean_logps.isfinite()
        return replace(groups, mean_logps=mean_logps, valid=valid, extras=dict(zip(extras, values, strict=True)))

    def _sampler_logps(self, output: Batch) -> Tensor:
        if "sampling_per_token_logps" not in output:
            raise ValueError(
                "mean_logps_from='sampler', but no log-probs came with the completions: let rollout_func return "
                "'logprobs', or set mean_logps_from='policy'."
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
        return self.accelerator.gather(_masked_mean(per_token_logps, mask).masked_fill(~rows, torch.nan))

    def _check_advantages(self, advantages: Tensor, groups: RolloutGroups) -> None:
        if advantages.shape != groups.rewards.shape:
            raise ValueError(
                f"{type(self).__name__}._compute_advantages must return one advantage a completion, shape "
                f"{tuple(groups.rewards.shape)}, got {tuple(advantages.shape)}."
            )
        if not advantages.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}._compute_advantages returned an advantage that is not finite. mean_logps is "
                "NaN where groups.valid is False and outside _rows_needing_logps, ref_mean_logps outside "
                "_rows_needing_ref: give those completions advantage 0, or let the hooks name them."
            )

    def _watch_for_idleness(self, advantages: Tensor, groups: RolloutGroups) -> None:
        fractions = metrics.group_fractions(groups.correct.cpu().numpy(), valid=groups.valid.cpu().numpy())
        learns = bool((advantages != 0).any())
        line = self._idle_watch.update(learns, fractions["frac_all_correct"], fractions["frac_all_wrong"])
        if line:
            self.accelerator.print(line)

    def _replace_advantages(self, output: dict[str, Tensor], advantages: Tensor) -> None:
        local = advantages[self._local_slice(output["advantages"].size(0))].to(output["advantages"])
        output["advantages"] = local
        logged = self._logs["advantages"]  # as long as a training generation; an evaluation batch may be longer
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _local_slice(self, num_rows: int) -> slice:
        return slice(self.accelerator.process_index * num_rows, (self.accelerator.process_index + 1) * num_rows)

    # Passes without gradient -----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        if self._defers_old_logps:
            self._old_logps_deferred = True
            return None, None, None
        # In evaluation the surrogate has the value of the log-probs, and its batches are larger.
        if self._reads_logits and self._loss_inputs is not None and self.model.training:
            return self._unfused_logps(model, input_ids, attention_mask, logits_to_keep)
        # TRL names a batch size where it passes over a whole generation, for the log-probs alone. It leaves dropout on
        # there: scores would be noise.
        passes_over_all = batch_size is not None and not torch.is_grad_enabled()
        for_logps_alone = not any(kwargs.get(f"compute_{x}") for x in ("entropy", "aux_loss"))
        with _in_eval_mode(model) if passes_over_all else nullcontext():
            if passes_over_all and for_logps_alone and self._repacking.trim:
                return self._sorted_logps(model, input_ids, attention_mask, logits_to_keep, batch_size), None, None
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs
            )

    def _sorted_logps(self, model, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int):
        """Log-probs of TRL's own pass over a generation, in the seam's sorted and trimmed batches."""
        prompt_width = input_ids.size(1) - logits_to_keep
        batch = {
            "prompt_ids": input_ids[:, :prompt_width],
            "prompt_mask": attention_mask[:, :prompt_width],
            "completion_ids": input_ids[:, prompt_width:],
            "completion_mask": attention_mask[:, prompt_width:],
        }
        return self._logps_of_rows(model, batch, None, batch_size)

    def _unfused_logps(self, model, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int):
        """Log-probs for the loss from all logits, which TRL's fused head never holds at once; and their entropies."""
        with self.accelerator.autocast():
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                logits_to_keep=logits_to_keep + 1,
            ).logits
        logps = (logits[:, :-1].float() / self.temperature).log_softmax(-1)
        with torch.set_grad_enabled(self._entropy_bonus_enabled):  # else it is only logged
            entropies = -(logps.exp() * logps).sum(-1)
        return self._logps_from_logits(logps, entropies.detach(), self._loss_inputs), entropies, None

    @torch.no_grad()
    def _policy_logps(self, output: Batch, rows: Tensor) -> Tensor:
        """Log-probs of the completion tokens under the policy without dropout, shape (B, T); 0 outside `rows`."""
        batch_size = self._no_grad_batch_size()
        with (
            _in_eval_mode(self.model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._logps_of_rows(self.model, output, rows, batch_size)

    @torch.no_grad()
    def _logps_of_rows(self, model, batch: Batch, rows: Tensor | None, batch_size: int) -> Tensor:
        """Log-probs of completion tokens (B, T) by TRL's own forward; 0 at padding and outside `rows` (None: all)."""
        if self._is_vlm:  # images are not one row a completion: the batch passes whole
            multimodal = {name: batch[name] for name in MULTIMODAL_INPUTS if name in batch}
            return self._logps_of_batch(model, batch, batch_size=batch_size, **multimodal)
        sizes = row_sizes(batch)
        lengths = sizes.sum(dim=1)
        index = torch.arange(len(lengths), device=lengths.device) if rows is None else rows.nonzero().squeeze(1)
        if self._repacking.trim:
            index = index[lengths[index].argsort(descending=True, stable=True)]
            batch_size = 2 * batch_size  # without activations to keep; and sorted rows are shorter than padded ones
        calls = math.ceil(len(index) / batch_size)
        if rows is not None:
            # A sharded model communicates in its forward: every rank makes as many calls as the busiest one.
            calls = int(self.accelerator.gather(torch.tensor([calls], device=lengths.device)).max())
        logps = torch.zeros(batch["completion_ids"].shape, device=lengths.device)
        if calls == 0:
            return logps
        shortest = lengths.argmin().expand(max(0, calls - len(index)))
        index = torch.cat([index, shortest])
        if self._repacking.trim:
            parts = index.split(even_cuts(sizes[index].tolist(), calls))
        else:
            parts = index.tensor_split(calls)
        for part in parts:
            micro_batch = take({name: batch[name] for name in TOKENS}, part)
            if self._repacking.trim:
                micro_batch = trim(micro_batch, self.pad_to_multiple_of)
            part_logps = self._logps_of_batch(model, micro_batch)
            logps[part, : part_logps.size(1)] = part_logps.float()
        return logps if rows is None else logps.masked_fill(~rows.unsqueeze(1), 0.0)

    def _logps_of_batch(self, model, batch: Batch, **kwargs) -> Tensor:
        logps, *_ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            **kwargs,
        )
        return logps

    def _no_grad_batch_size(self) -> int:
        training = self.model.training
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

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
            kept = kept if repacking.trim else "batches stay as TRL makes them"
            self.accelerator.print(f"repack: {kept}, for {repacking.reason}.")
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
        # Rows may only move between micro-batches that every optimizer step has all of, or none: blocks of these.
        block_size = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        blocks = [concatenate(micro_batches[i : i + block_size]) for i in range(0, len(micro_batches), block_size)]
        if self._repacking.prune:
            keep = [has_gradient(block) for block in blocks]
        else:
            keep = [torch.ones_like(block["prompt_mask"][:, 0], dtype=torch.bool) for block in blocks]
        # Ranks cut alike, each place by its longest row on any rank: TRL gathers one number a row for its clip
        # metrics, and a rank whose rows are short there must not be handed more of its long ones.
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

    # Metrics ---------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        # With several ranks the last batch is filled up with the first prompts again: those must not count twice.
        self._num_eval_prompts = len(dataloader.dataset) if isinstance(dataloader.dataset, Dataset) else None
        self._eval_prefix = metric_key_prefix
        self._window["eval"].clear()  # `predict` runs this loop and logs nothing
        return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # TRL averages what was appended to its metrics, and the mean of batch AUCs is not the AUC of the set: so the
        # window's rows are kept, and its metrics computed here. As in TRL, an undefined one (NaN) is logged as None.
        training = self.model.training
        window = self._window["train" if training else "eval"]
        if window:
            num_prompts = None if training else self._num_eval_prompts
            rows = {name: np.concatenate(arrays)[:num_prompts] for name, arrays in window.items()}
            prefix = "" if training else f"{self._eval_prefix}_"
            for name, value in self._calibration_metrics(rows).items():
                logs[prefix + name] = None if math.isnan(value) else value
            window.clear()
        if not training and self._eval_prefix.startswith("eval_"):
            # TRL's metrics would not say which of several sets they are of: each has them under its own name too.
            of_set = self._eval_prefix.removeprefix("eval_")
            own = self._metrics["eval"]
            own.update({f"{of_set}_{name}": values for name, values in own.items()})
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics, trial):
        # An undefined metric is logged as None, which compares with nothing; NaN does, and is never the best.
        defined = {name: math.nan if value is None else value for name, value in metrics.items()}
        return super()._determine_best_metric(defined, trial)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card for this model: its repository, question, figures and recipe, and what `trl-capo report` put."""
        super().create_model_card(*args, **kwargs)
        self._complete_card(self.args.output_dir)

    def _complete_card(self, folder: str) -> None:
        if self.is_world_process_zero():
            card = complete_card(
                folder,
                repo_id=self.hub_model_id or self.args.hub_model_id,
                question=example_question(self.train_dataset),
                history=self.state.log_history,
            )
            write_text(Path(folder, "README.md"), card)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers, with a card, for `trl-capo push`; weights that are not finite are refused."""
        # Unless the weights are sharded, it may be called on one rank alone.
        self._check_parameters(on_all_ranks=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if not _internal_call and Path(folder).resolve() != Path(self.args.output_dir).resolve():
            self._complete_card(folder)
        elif not _internal_call and not self.args.push_to_hub:
            self.create_model_card(model_name=(self.args.hub_model_id or Path(folder).resolve().name).split("/")[-1])

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As transformers, which creates the repository before it trains; one that must be private has to be.

        A failure says what to do, in one line.
        """
        private = wants_private(self.args.hub_private_repo, private)
        try:
            super().init_hf_repo(token, private)
            self._check_private(private, token)
        except (HTTPError, OSError) as error:
            reason = mask(" ".join(str(error).split()))
            raise OSError(
                f"push_to_hub: the repository could not be created ({reason}). Log in with `hf auth login` or set "
                "HF_TOKEN; or train without push_to_hub and push afterwards: "
                f"{push_command(self.args.output_dir, self.args.hub_model_id or 'NAME', private)}"
            ) from error

    def push_to_hub(self, *args, **kwargs):
        """As transformers, of what belongs on the Hub; a failure says where the model is, and how to upload it."""
        given = inspect.signature(super().push_to_hub).bind(*args, **kwargs).arguments
        private = wants_private(self.args.hub_private_repo, given.get("private"))
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(given.get("token"), private)
            else:
                self._check_private(private, given.get("token"))
            with guarded_uploads(private):
                return super().push_to_hub(*args, **kwargs)
        except (HTTPError, OSError, RuntimeError) as error:
            repo_id = self.hub_model_id or self.args.hub_model_id or "NAME"
            command = push_command(self.args.output_dir, repo_id, private)
            error.add_note(f"Nothing is lost: the model is in {self.args.output_dir}. To upload it: {command}")
            raise

    def _check_private(self, private: bool | None, token: str | None) -> None:
        if private and self.is_world_process_zero():
            check_private(self.hub_model_id, token or self.args.hub_token)

    def _save(self, *args, **kwargs):
        # The arguments are pickled beside the model, and go to the Hub with a checkpoint.
        own, self.args = self.args, without_secrets(self.args)
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = own

    def train(self, resume_from_checkpoint: "str | bool | None" = None, *args, **kwargs) -> TrainOutput:
        """As TRL, with `True` for the newest complete checkpoint; a finished run is restored and not trained on."""
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        start = 0
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            start = state.global_step
            if self._lies_within_a_generation(checkpoint, state):
                self.accelerator.print(
                    f"⚠️ {checkpoint} lies in the middle of a generation, whose completions are not saved: the resumed "
                    "run will not be exactly the uninterrupted one."
                )
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if 0 < self.args.max_steps <= state.global_step and not sharded:
                return self._restore_finished_run(checkpoint, state)
        self._run = agree(lambda: begin_run(self.args.output_dir, self._resumed))
        if self.is_world_process_zero():
            forget_calibration(self.args.output_dir)
        result = super().train(checkpoint, *args, **kwargs)
        if self.state.global_step == start and (checkpoint is None or start < self.state.max_steps):
            raise UserError(
                f"no optimizer step was made, so there is nothing to save: the training data gave no whole generation "
                f"of {self.args.generation_batch_size // self.num_generations} prompts after step {start}. Give more "
                "prompts, or lower generation_batch_size or raise num_generations."
            )
        self._check_parameters()
        return result

    def _checkpoint_to_resume(self, wanted: "str | bool | None") -> str | None:
        """The folder, the same on all ranks; what cannot be resumed from is refused."""
        self._resumed = None
        newest = wanted is True
        if newest:
            wanted, search = newest_checkpoint(self.args.output_dir, self.accelerator.print)
        check_same_checkpoint(gather_object([checkpoint_step(wanted)]))
        if newest and wanted is None:
            reasons = "".join(f" {line}" for line in search.lines)
            raise UserError(f"There is no complete checkpoint in {self.args.output_dir!r} to resume from.{reasons}")
        if not wanted:
            return None
        named = checkpoint_named(wanted, self.args.output_dir)
        self._resumed = replace(named, folder=Path(wanted))  # the first host's folder may be another
        for line in what_differs(self._resumed, self.args, self.is_deepspeed_enabled):
            self.accelerator.print(line)
        return str(wanted)

    def _lies_within_a_generation(self, checkpoint: str, state: TrainerState) -> bool:
        path = Path(checkpoint, STATE_FILE)
        by_the_count = state.global_step % steps_between_generations(self.args) != 0
        return truth(read_state(path), "within_a_generation", by_the_count) if path.exists() else by_the_count

    def _restore_finished_run(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        # From the checkpoint of the last step transformers would train one step more.
        self.accelerator.print(f"{checkpoint} is the end of a run of {state.global_step} steps: nothing to train.")
        self.state, self._run = state, self._resumed.run
        self._load_from_checkpoint(checkpoint)
        self._load_state_file(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(sampler, RepeatSampler):
            return sampler
        sampler.repeat_count *= self.generations_per_batch(self.args)
        if not sampler.shuffle:
            return sampler
        return _EpochRepeatSampler(
            sampler.data_source,
            sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            seed=sampler.seed,
        )

    def _init_training_state(self, max_steps, *args):
        epochs, batches = super()._init_training_state(max_steps, *args)
        self._stream = StreamPosition()
        if self._resumed is None:
            return epochs, batches
        # A checkpoint's state has the old run's intervals, and a best value that may be of another metric.
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        before = (self._resumed.manifest or {"options": {}})["options"]
        if {"metric_for_best_model", "greater_is_better"} & set(changed_options(before, self.args)):
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        if isinstance(self.train_dataset, IterableDataset) and not self.args.ignore_data_skip:
            # transformers takes a stream for endless and would skip all batches so far in its first pass.
            path = self._resumed.folder / STATE_FILE
            saved = read_state(path) if path.exists() else {}
            if "stream_pass" in saved:
                with _naming(path):
                    epochs, batches = whole_number(saved, "stream_pass"), whole_number(saved, "stream_batches")
            else:
                self.accelerator.print(
                    "⚠️ The checkpoint does not say how often its stream was read: prompts may repeat."
                )
            self._stream = StreamPosition.at(epochs, batches)
        return epochs, batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As transformers; the position in a stream is counted."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._stream.count(epoch_iterator, len(samples))
        return samples, num_items

    def _get_grad_norm(self, model, grad_norm=None):
        # Called before each optimizer step, whether gradients are clipped or not.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        check_gradient_norm(norm, step, self.args, scaler, self._last_checkpoint)
        return norm

    def _check_parameters(self, on_all_ranks: bool = True) -> None:
        gather = gather_object if on_all_ranks else None
        check_parameters(self.model, self.state.global_step, self.args, self._last_checkpoint, gather)

    def _last_checkpoint(self) -> str | None:
        return last_complete_checkpoint(self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        self._check_parameters()
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{self.state.global_step}")
        # Not by the count of optimizer steps: the last one of an epoch may take fewer micro-batches.
        within = self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0
        state = {**self._method_state(), "within_a_generation": within, "manifest": MANIFEST}
        if isinstance(self.train_dataset, IterableDataset):
            state |= {"stream_pass": self._stream.number, "stream_batches": self._stream.batches}
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # files of another run would be taken for this one's
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # Written first: it tells a checkpoint without a manifest from one of a version that wrote none.
            os.makedirs(folder, exist_ok=True)
            write_json(Path(folder, STATE_FILE), state)
            if self._saves_reference():
                self.accelerator.unwrap_model(self.ref_model).save_pretrained(os.path.join(folder, REFERENCE_DIR))
        with _removes_no_checkpoints():
            super()._save_checkpoint(model, trial)
        if not self.args.push_to_hub:
            self._complete_checkpoint(folder)
        if self.args.should_save:
            remove_old_checkpoints(run_dir, self._run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._complete_checkpoint(checkpoint_folder)  # before it is uploaded
        with guarded_uploads(self.args.hub_private_repo):
            super()._push_from_checkpoint(checkpoint_folder)

    def _complete_checkpoint(self, folder: str) -> None:
        self.accelerator.wait_for_everyone()  # each rank writes files of its own
        if self.args.should_save:
            write_manifest(
                folder,
                self._run,
                self.state.global_step,
                exact=not self.args.save_only_model,
                world_size=self.args.world_size,
                options=recorded_options(self.args),
            )

    def _finalize_training(self, *args):
        with _removes_no_checkpoints():  # transformers would remove those of other runs, too
            result = super()._finalize_training(*args)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            remove_old_checkpoints(self.args.output_dir, self._run, 1, best, keep_newest=False)
        return result

    def _load_best_model(self):
        check_best(self.state.best_model_checkpoint, self._run)
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        configured = hyperparameters(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_deepspeed_enabled:
            restore_hyperparameters(self.optimizer, self.lr_scheduler, configured)
        self._load_state_file(checkpoint)

    def _load_state_file(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_FILE)
        if os.path.exists(path):
            with _naming(path):
                self._load_method_state(read_state(path))
        elif self._method_state():
            self.accelerator.print(f"⚠️ {checkpoint} has no {STATE_FILE}: {self._name} estimates its constants anew.")
        folder = os.path.join(checkpoint, REFERENCE_DIR)
        if self._saves_reference() and not os.path.isdir(folder):
            self.accelerator.print(f"⚠️ {checkpoint} has no moving reference: it starts from the initial model.")
        elif self._saves_reference():
            reference = self.accelerator.unwrap_model(self.ref_model)
            saved = type(reference).from_pretrained(folder, dtype=reference.dtype)
            reference.load_state_dict(saved.state_dict())

    def _saves_reference(self) -> bool:
        return self.args.sync_ref_model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check_config(self, args: GRPOConfig) -> None:
        if self.config_class is GroupAdvantageConfig and isinstance(args, GRPOConfig):
            for option in fields(GroupAdvantageConfig):  # TRL's own configuration will do for GRPO
                if not hasattr(args, option.name):
                    setattr(args, option.name, option.default)
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__} as args, got {type(args).__name__}."
            )


class _EpochRepeatSampler(RepeatSampler):
    """TRL's sampler in the same order, but able to start at any epoch, so that a resumed run sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked positions of each row, shape (B,); NaN for a row without any."""
    return (values.float() * mask).sum(dim=1) / mask.sum(dim=1)


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Errors about a value name the file that it is from."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing. Resume from another checkpoint.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}. Resume from another checkpoint.") from None


@contextmanager
def _removes_no_checkpoints() -> Iterator[None]:
    """transformers leaves old checkpoints alone: it does not tell those of this run from others'."""
    names = {"rotate_checkpoints": lambda **kwargs: None, "sort_checkpoints": lambda **kwargs: []}
    originals = {name: getattr(transformers_trainer, name) for name in names}
    try:
        for name, function in names.items():
            setattr(transformers_trainer, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(transformers_trainer, name, function)


@contextmanager
def _reference_from(
    source: "PreTrainedModel | str | None", dtype: str | None, policy_is_loaded: bool
) -> Iterator[None]:
    """While TRL's constructor runs, the reference model it loads is `source`, in `dtype` if one is given.

    TRL loads the policy (unless it is an instance) and then the reference through one function; what it does with the
    reference afterwards (dropout, precision of the head, sharding, moving average) stays TRL's.
    """
    if source is None and dtype is None:
        yield
        return
    load = grpo_trainer.create_model_from_path
    pending_policy = [] if policy_is_loaded else [True]

    def load_policy_then_source(model_id, **kwargs):
        if pending_policy and pending_policy.pop():
            return load(model_id, **kwargs)
        if isinstance(source, PreTrainedModel):
            return source if dtype is None else source.to(getattr(torch, dtype))
        if dtype is not None:
            kwargs["dtype"] = dtype
        if source is None:
            return load(model_id, **kwargs)
        return load(source, **{**kwargs, "revision": None})  # the revision is the policy's

    grpo_trainer.create_model_from_path = load_policy_then_source
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
