"""The seam for methods: the whole batch as groups, one pure function, its advantages in place of TRL's.

TRL computes advantages inline and offers no hook for them. `GroupAdvantageTrainer` lets TRL do all its work, then
shows the whole batch as groups to one pure function and puts the result in place of TRL's advantages. A method
subclasses it and defines `_compute_advantages(groups) -> (P, G)`.

Order of a generation, the same on every rank since each gather is a collective: TRL generates, scores and gathers the
rewards; the policy passes over the rows whose log-probs the method reads, then the reference over those that need it;
then advantages are computed from global tensors, identically on every rank, the mask is applied, and each rank keeps
its slice. Groups may straddle ranks. Last, the generation is cut into micro-batches anew
(`trl_capo.trainer.fast_step`).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from trl_capo.calibration import metrics
from trl_capo.errors import UserError
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.groups import RolloutGroups
from trl_capo.trainer.idle import IdleWatch
from trl_capo.trainer.metrics import CalibrationLogging
from trl_capo.trainer.repack import Batch
from trl_capo.trainer.scoring import GroupScoringTrainer


class GroupAdvantageTrainer(CalibrationLogging, GroupScoringTrainer):
    """`GRPOTrainer` whose advantages may depend on whole groups. Takes the same arguments.

    Used as it is, it is GRPO with calibration metrics. Hooks for a method, all optional: `_compute_advantages`,
    `_unmasked_advantages`, `_setup_method`, `needs_ref`, `_rows_needing_logps`, `_rows_needing_ref`,
    `_rows_with_advantage`, `_sequence_statistics`, `_token_advantages`, `_choose_prompts`, `_logps_from_logits`,
    `_calibration_arrays`, `_calibration_metrics`, `_method_state`, `_load_method_state`. The mask of
    `args.ref_ppl_mask` is not among them: the trainer updates, applies, logs and saves it for every method.

    Raises:
        TypeError: `args` is not of `config_class` (GRPO through the seam also takes TRL's own `GRPOConfig`).
        UserError: Bad input that would only show during training: see `trl_capo.preflight`.
    """

    _tag_names = ["trl", "trl-capo", "grpo"]
    _logs: dict[str, Any]
    _replaces_advantages = False  # whether `_compute_advantages` starts from the weighted sum of the rewards

    def __init_subclass__(cls, **kwargs):
        """A method is called as its class unless it has a `_name`, and credits no paper unless it has a `_paper`."""
        super().__init_subclass__(**kwargs)
        if GroupAdvantageTrainer in cls.__bases__:
            cls._name = cls.__dict__.get("_name", cls.__name__.removesuffix("Trainer"))
            cls._paper = cls.__dict__.get("_paper", {})

    def _setup(self) -> None:
        super()._setup()
        self._idle_watch = IdleWatch()
        if self._replaces_advantages:
            self._refuse_other_aggregations()
        self._setup_method()

    def _refuse_other_aggregations(self) -> None:
        if self.args.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation={self.args.multi_objective_aggregation!r} turns rewards into advantages "
                f"in TRL's way, where {self._name} has its own: set it to 'sum_then_normalize'."
            )

    @classmethod
    def needs_correct(cls, args: GroupAdvantageConfig) -> bool:
        return cls._replaces_advantages or super().needs_correct(args)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _setup_method(self) -> None:
        """What a method adds to the constructor; everything else of the trainer is there."""

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor | None:
        """Advantages of a generation, shape (P, G). None keeps those that TRL computed."""
        return None

    def _unmasked_advantages(self, groups: RolloutGroups) -> Tensor | float:
        """Added to the advantages after the mask was applied, shape (P, G): what a dropped completion keeps."""
        return 0.0

    def _token_advantages(self, advantages: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This rank's advantages (B,) as they enter the loss; a method may make them (B, T)."""
        return advantages

    def _choose_prompts(self, inputs: list[dict]) -> list[dict]:
        """This rank's rows of a training generation, each prompt `num_generations` times; as many must come back."""
        return inputs

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        """What the method's own metrics need to keep of a generation; each array starts with the prompt axis."""
        return {}

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """The method's own metrics over the logging window, from all its arrays, concatenated along the prompts."""
        return {}

    # Around a generation ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            inputs = self._choose_prompts(self._select_prompts(inputs))
            if self.selection is not None:
                numbers = [self.selection.number_of(row["prompt"]) for row in inputs]
                numbers = self.accelerator.gather(torch.tensor(numbers, device=self.accelerator.device))
                self._prompt_numbers = numbers.tolist()[:: self.num_generations]
        return super()._generate_and_score_completions(inputs)

    def _select_prompts(self, inputs: list[dict]) -> list[dict]:
        """This rank's rows for the prompts that `selection` chooses; without it the rows that the sampler drew."""
        if self.selection is None:
            return inputs
        if self.selection.generation % self.generations_per_batch(self.args) == 0:
            # Chosen once and sent to all: other processors may round the same scores in another order.
            chosen = [self.selection.choose(self.num_generations) if self.accelerator.is_main_process else None]
            self.selection.chosen = broadcast_object_list(chosen)[0]
        numbers = [number for number in self.selection.chosen for _ in range(self.num_generations)]
        local = numbers[self._local_slice(len(inputs))]
        rows = (self.train_dataset[self.selection.rows[number]] for number in local)
        return [{name: row[name] for name in inputs[0]} for row in rows]

    def _learn_of_prompts(self, groups: RolloutGroups) -> None:
        by_label = self.needs_correct(self.args)
        self.selection.update(
            self._prompt_numbers,
            (groups.correct if by_label else groups.rewards).cpu().numpy(),
            taught=(groups.mixed if by_label else groups.varied).squeeze(1).cpu().numpy(),
        )

    def _after_scoring(self, output: Batch) -> tuple[Tensor, Tensor]:
        groups, per_token_logps, scored = self._build_groups(output)
        if self.model.training:
            self.mask.update(groups)
            if self.selection is not None:
                self._learn_of_prompts(groups)
        groups = replace(groups, kept=self.mask.kept(groups))
        advantages = self._compute_advantages(groups)
        if advantages is not None:
            self._refuse_other_aggregations()
            self._check_shape(advantages, groups)
        elif self.mask.active:  # it drops from TRL's own
            advantages = self.accelerator.gather(output["advantages"]).view(groups.valid.shape)
        if advantages is not None:
            advantages = advantages.masked_fill(~groups.kept, 0.0) + self._unmasked_advantages(groups)
            self._check_finite(advantages)
            if self.model.training:
                self._watch_for_idleness(advantages, groups)
            self._replace_advantages(output, advantages.flatten())
        output["advantages"] = self._token_advantages(output["advantages"], output)
        if self._correctness_index is None:
            return per_token_logps, scored
        arrays = {**self._group_arrays(groups), **self.mask.arrays(groups), **self._calibration_arrays(groups)}
        self._remember({name: array.float().cpu().numpy() for name, array in arrays.items()})
        return per_token_logps, scored

    def _watch_for_idleness(self, advantages: Tensor, groups: RolloutGroups) -> None:
        fractions = metrics.group_fractions(groups.correct.cpu().numpy(), valid=groups.valid.cpu().numpy())
        learns = bool((advantages != 0).any())
        line = self._idle_watch.update(learns, fractions["frac_all_correct"], fractions["frac_all_wrong"])
        if line:
            self.accelerator.print(line)

    def _group_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        uniform = {}
        if self.model.training and self.selection is not None:
            uniform = {"drawn_uniformly": torch.tensor(self.selection.drawn_uniformly(self._prompt_numbers))}
        return uniform | {
            "correct": groups.correct,
            # What else is scored in training depends on method and settings, and curves should be comparable.
            "mean_logps": groups.mean_logps.masked_fill(self.model.training & ~groups.mixed, torch.nan),
            "valid": groups.valid,
            "in_mixed_group": groups.mixed & groups.valid,
        }

    def _window_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        own = self._calibration_metrics(window)
        selection = {} if self.selection is None else self.selection.metrics(window)
        return {**super()._window_metrics(window), **self.mask.metrics(window), **selection, **own}

    def _check_shape(self, advantages: Tensor, groups: RolloutGroups) -> None:
        if advantages.shape != groups.rewards.shape:
            raise UserError(
                f"{type(self).__name__}._compute_advantages must return one advantage a completion, shape "
                f"{tuple(groups.rewards.shape)}, got {tuple(advantages.shape)}."
            )

    def _check_finite(self, advantages: Tensor) -> None:
        if not advantages.isfinite().all():
            raise UserError(
                f"{type(self).__name__}._compute_advantages returned an advantage that is not finite. mean_logps is "
                "NaN where groups.valid is False and outside _rows_needing_logps, ref_mean_logps outside "
                "_rows_needing_ref: give those completions advantage 0, or let the hooks name them."
            )

    def _replace_advantages(self, output: dict[str, Tensor], advantages: Tensor) -> None:
        local = advantages[self._local_slice(output["advantages"].size(0))].to(output["advantages"])
        output["advantages"] = local
        logged = self._logs["advantages"]  # as long as a training generation; an evaluation batch may be longer
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    # State -----------------------------------------------------------------------------------------------------------

    def _all_state(self) -> dict:
        selection = {} if self.selection is None else {"prompt_selection": self.selection.state()}
        return {**super()._all_state(), **self.mask.state(), **selection}

    def _load_all_state(self, state: dict) -> None:
        super()._load_all_state(state)
        self.mask.load_state(state)
        if self.selection is not None and "prompt_selection" in state:
            self.selection.load_state(state["prompt_selection"])
