"""The seam: the one file that knows TRL's private methods (tested with TRL 1.16).

TRL computes advantages inline and offers no hook for them. `GroupAdvantageTrainer` lets TRL do all its work, then
shows the whole batch as groups to one pure function and puts the result in place of TRL's advantages. Nothing of TRL
is copied: every method here calls `super()` and changes one thing. A method subclasses it and defines
`_compute_advantages(groups) -> (P, G)`; used as it is, it is GRPO with calibration metrics.

Order of a generation, the same on every rank since each gather is a collective: TRL generates, scores and gathers the
rewards; mean log-probs are gathered; then the reference passes over the rows that need it; then advantages are
computed from global tensors, identically on every rank, and each rank keeps its slice. Groups may straddle ranks.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler, get_config_model_id, use_adapter

from trl_capo.calibration import metrics
from trl_capo.checkpoints import last_complete_checkpoint
from trl_capo.checks import (
    check_data,
    check_launch,
    check_output_dir,
    check_save_steps,
    find_correctness_reward,
    reward_names,
    steps_between_generations,
)
from trl_capo.group_config import GroupAdvantageConfig
from trl_capo.reference import make_room_for_reference_adapter, reference_source


# One or several of: a function, the id of a reward model, a reward model.
RewardFunctions = Callable | str | PreTrainedModel | list[Callable | str | PreTrainedModel]

STATE_FILE = "trl_capo_state.json"
REFERENCE_DIR = "reference"

# Inputs of a vision-language model. They are not one row a completion, so its batches pass the reference whole.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass(frozen=True)
class RolloutGroups:
    """One generation over all ranks, as groups: P prompts with G completions each. All tensors are detached.

    Attributes:
        rewards: Weighted sum of the reward functions, shape (P, G). NaN = no function could score it.
        rewards_per_func: Each reward function's output, unweighted, shape (P, G, K).
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean log-prob of the unmasked completion tokens (EOS included) under the policy that generated
            them, in nats, at the sampling temperature, shape (P, G). NaN without such a token.
        lengths: Number of unmasked completion tokens, shape (P, G).
        valid: Scorable and with at least one unmasked token, shape (P, G), boolean. A fully masked (truncated) row
            would have a mean log-prob of 0, the surest of all, were it not for this.
        ref_mean_logps: `mean_logps` under the reference, NaN where it was not computed; None without a reference.
        extras: What `_sequence_statistics` returned, each of shape (P, G).
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
    """`GRPOTrainer` whose advantages may depend on whole groups. Takes the same arguments, the rest by keyword.

    Hooks for a method, all optional: `_compute_advantages`, `_setup_method`, `needs_ref`, `_rows_needing_ref`,
    `_sequence_statistics`, `_token_advantages`, `_calibration_arrays`, `_calibration_metrics`, `_method_state`,
    `_load_method_state`.

    Raises:
        TypeError: `args` is not of `config_class` (GRPO through the seam also takes TRL's own `GRPOConfig`).
        ValueError: Bad input that would only show during training: see `trl_capo.checks`.
    """

    config_class = GroupAdvantageConfig
    _tag_names = ["trl", "trl-capo", "grpo"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunctions | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        self._check_config(args)
        check_launch(args)
        check_save_steps(args)
        check_output_dir(args.output_dir)
        if kwargs.get("environment_factory") is None:  # an environment brings its own prompts, and perhaps a reward
            check_data(reward_funcs, train_dataset=train_dataset, eval_dataset=eval_dataset)
            find_correctness_reward(reward_names(reward_funcs), args.correctness_reward)

        beta = args.beta
        use_ref = self.needs_ref(args)
        loaded = not isinstance(model, str)
        policy_is_peft = kwargs.get("peft_config") is not None or (loaded and is_peft_model(model))
        if use_ref and loaded and is_peft_model(model):
            make_room_for_reference_adapter(model)
        reference = reference_source(model, args, policy_is_peft) if use_ref or beta != 0 else None
        if use_ref and beta == 0:
            args.beta = 1.0  # any nonzero value makes TRL build, wrap and shard its reference model
        try:
            with _reference_from(reference, policy_is_loaded=loaded):
                super().__init__(
                    model, reward_funcs, args, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
                )
        finally:
            args.beta = beta
        self.beta = beta

        self._correctness_index = find_correctness_reward(self.reward_func_names, args.correctness_reward)
        self._rewards_per_func = None
        self._window = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._num_eval_prompts = None
        self._eval_prefix = "eval"
        self._setup_method()
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

    def _rows_needing_ref(self, groups: RolloutGroups) -> Tensor:
        """Completions whose reference log-probs can matter, shape (P, G), boolean. Must be the same on every rank."""
        return groups.mixed & groups.valid

    def _sequence_statistics(self, per_token_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """More numbers a completion, each of shape (B,), from its log-probs and mask (B, T); end up in `extras`."""
        return {}

    def _token_advantages(self, advantages: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This rank's advantages (B,) as they enter the loss; a method may make them (B, T)."""
        return advantages

    def _method_state(self) -> dict:
        """What must survive a restart besides the model, as JSON. Equal on every rank."""
        return {}

    def _load_method_state(self, state: dict) -> None:
        """Restores what `_method_state` returned when the checkpoint was written."""

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        """What the metrics need to keep of a generation; each array starts with the prompt axis."""
        return {
            "correct": groups.correct,
            "mean_logps": groups.mean_logps,
            "valid": groups.valid,
            "in_mixed_group": groups.mixed & groups.valid,
        }

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics over the logging window, from its `_calibration_arrays`, concatenated along the prompts."""
        correct, mean_logps = window["correct"], window["mean_logps"]
        valid = window["valid"].astype(bool) & ~np.isnan(correct)
        in_mixed_group = window["in_mixed_group"].astype(bool)
        fractions = metrics.group_fractions(correct, valid=valid)
        return {
            "capo/auc_within": metrics.auc_within(correct, mean_logps, valid=valid),
            "capo/auc_pooled": metrics.auc_pooled(correct, mean_logps, valid=valid),
            **{f"capo/{name}": value for name, value in fractions.items()},
            "capo/frac_unscorable": 1.0 - float(valid.mean()),
            "capo/ppl_correct": metrics.perplexity(mean_logps[in_mixed_group & (correct == 1)]),
            "capo/ppl_wrong": metrics.perplexity(mean_logps[in_mixed_group & (correct == 0)]),
        }

    # Around a generation ---------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        groups = self._build_groups(output)
        advantages = self._compute_advantages(groups)
        if advantages is not None:
            if advantages.shape != groups.rewards.shape:
                raise ValueError(
                    f"{type(self).__name__}._compute_advantages must return one advantage a completion, shape "
                    f"{tuple(groups.rewards.shape)}, got {tuple(advantages.shape)}."
                )
            self._replace_advantages(output, advantages.flatten())
        window = self._window["train" if self.model.training else "eval"]
        for name, array in self._calibration_arrays(groups).items():
            window[name].append(array.float().cpu().numpy())
        return output

    @torch.no_grad()
    def _build_groups(self, output: dict[str, Tensor]) -> RolloutGroups:
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        rewards_per_func = self._rewards_per_func
        weights = self.reward_weights.to(rewards_per_func.device)
        unscorable = rewards_per_func.isnan().all(dim=1)
        rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)
        label = rewards_per_func[:, self._correctness_index]
        correct = (label >= self.args.correct_threshold).float().masked_fill(label.isnan(), torch.nan)

        mask = output["completion_mask"] * output.get("tool_mask", 1)
        per_token_logps = output.get("old_per_token_logps")
        if per_token_logps is None:  # on-policy without vLLM correction: TRL skips this pass
            per_token_logps = self._per_token_logps(self.model, output)
        statistics = {"mean_logps": _masked_mean(per_token_logps, mask), "lengths": mask.sum(dim=1)}
        extras = self._sequence_statistics(per_token_logps, mask)
        local = torch.stack([value.float() for value in (*statistics.values(), *extras.values())], dim=1)
        gathered = self.accelerator.gather(local).view(-1, num_generations, local.size(1)).unbind(dim=2)
        mean_logps, lengths, *extra_values = gathered

        groups = RolloutGroups(
            rewards=rewards.view(-1, num_generations),
            rewards_per_func=rewards_per_func.view(-1, num_generations, rewards_per_func.size(1)),
            correct=correct.view(-1, num_generations),
            mean_logps=mean_logps,
            lengths=lengths,
            valid=rewards.view(-1, num_generations).isfinite() & (lengths > 0),
            extras=dict(zip(extras, extra_values, strict=True)),
        )
        if self.needs_ref(self.args):
            ref_mean_logps = self._ref_mean_logps(output, mask, self._rows_needing_ref(groups))
            groups = replace(groups, ref_mean_logps=ref_mean_logps.view(-1, num_generations))
        return groups

    def _ref_mean_logps(self, output: dict[str, Tensor], mask: Tensor, rows: Tensor) -> Tensor:
        """Mean log-probs of all ranks' completions under the reference, shape (P * G,); NaN outside `rows`."""
        rows = rows.flatten()[self._local_slice(mask.size(0))]
        if "ref_per_token_logps" in output:  # beta > 0: TRL's own pass serves the mask too
            mean_logps = _masked_mean(output["ref_per_token_logps"], mask)
        elif self._is_vlm:
            mean_logps = _masked_mean(self._ref_per_token_logps(output), mask)
        else:
            mean_logps = self._ref_mean_logps_of(output, mask, rows)
        return self.accelerator.gather(mean_logps.float().masked_fill(~rows, torch.nan))

    def _ref_mean_logps_of(self, output: dict[str, Tensor], mask: Tensor, rows: Tensor) -> Tensor:
        index = rows.nonzero().squeeze(1)
        batch_size = self._no_grad_batch_size()
        # A sharded reference runs collectives in its forward: every rank makes as many calls as the busiest one.
        calls = self.accelerator.gather(torch.tensor([math.ceil(len(index) / batch_size)], device=rows.device)).max()
        missing = max(0, (int(calls) - 1) * batch_size + 1 - len(index))
        index = torch.cat([index, index.new_zeros(missing)])
        mean_logps = torch.full(rows.shape, torch.nan, device=rows.device)
        if len(index) > 0:
            keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            subset = {key: output[key][index] for key in keys}
            mean_logps[index] = _masked_mean(self._ref_per_token_logps(subset), mask[index]).float()
        return mean_logps

    def _ref_per_token_logps(self, output: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            return self._per_token_logps(self.ref_model, output)
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._per_token_logps(self.model, output)

    @torch.no_grad()
    def _per_token_logps(self, model, output: dict[str, Tensor]) -> Tensor:
        """Log-probs of the completion tokens, shape (B, T), by TRL's own forward, without dropout."""
        batch_size = self._no_grad_batch_size()
        was_training = model.training
        model.eval()
        try:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                logps, *_ = self._get_per_token_logps_and_entropies(
                    model,
                    torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                    torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                    output["completion_ids"].size(1),
                    batch_size=batch_size,
                    **{name: output[name] for name in MULTIMODAL_INPUTS if name in output},
                )
        finally:
            model.train(was_training)
        return logps

    def _no_grad_batch_size(self) -> int:
        training = self.model.training
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

    def _replace_advantages(self, output: dict[str, Tensor], advantages: Tensor) -> None:
        local = advantages[self._local_slice(output["advantages"].size(0))].to(output["advantages"])
        output["advantages"] = self._token_advantages(local, output)
        logged = self._logs["advantages"]  # as long as a training generation; an evaluation batch may be longer
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _local_slice(self, num_rows: int) -> slice:
        return slice(self.accelerator.process_index * num_rows, (self.accelerator.process_index + 1) * num_rows)

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
        super().log(logs, start_time)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: "str | bool | None" = None, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir!r} to resume from.")
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            if state.global_step % steps_between_generations(self.args) != 0:
                self.accelerator.print(
                    f"⚠️ {resume_from_checkpoint} lies in the middle of a generation, whose completions are not saved: "
                    "the resumed run will not be exactly the uninterrupted one."
                )
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if 0 < self.args.max_steps <= state.global_step and not sharded:
                return self._restore_finished_run(resume_from_checkpoint, state)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _restore_finished_run(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        # From the checkpoint of the last step transformers would train one step more.
        self.accelerator.print(f"{checkpoint} is the end of a run of {state.global_step} steps: nothing to train.")
        self.state = state
        self._load_from_checkpoint(checkpoint)
        self._load_state_file(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not (isinstance(sampler, RepeatSampler) and sampler.shuffle):
            return sampler
        return _EpochRepeatSampler(
            sampler.data_source,
            sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            seed=sampler.seed,
        )

    def _save_checkpoint(self, model, trial):
        # Written first: a checkpoint counts as complete once the trainer state, which TRL writes last, is there.
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump(self._method_state(), file)
            if self._saves_reference():
                self.accelerator.unwrap_model(self.ref_model).save_pretrained(os.path.join(folder, REFERENCE_DIR))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_state_file(checkpoint)

    def _load_state_file(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_FILE)
        if os.path.exists(path):
            with open(path) as file:
                self._load_method_state(json.load(file))
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
        if self.config_class is GroupAdvantageConfig and type(args) is GRPOConfig:
            for option in fields(GroupAdvantageConfig):  # a plain GRPOConfig will do for GRPO
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
def _reference_from(source: "PreTrainedModel | str | None", policy_is_loaded: bool) -> Iterator[None]:
    """While TRL's constructor runs, the reference model it loads is `source`.

    TRL loads the policy (unless it is an instance) and then the reference through one function; what it does with the
    reference afterwards (dropout, precision of the head, sharding, moving average) stays TRL's.
    """
    if source is None:
        yield
        return
    load = grpo_trainer.create_model_from_path
    pending_policy = [] if policy_is_loaded else [True]

    def load_policy_then_source(model_id, **kwargs):
        if pending_policy and pending_policy.pop():
            return load(model_id, **kwargs)
        if isinstance(source, PreTrainedModel):
            return source
        return load(source, **{**kwargs, "revision": None})  # the revision is the policy's

    grpo_trainer.create_model_from_path = load_policy_then_source
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
