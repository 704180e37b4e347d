"""The trainer that methods extend: one pure function of whole groups replaces TRL's advantages.

TRL computes advantages inline and offers no hook for them. `GroupAdvantageTrainer` lets TRL do all its work, then
passes the whole batch as groups to one pure function and replaces TRL's advantages with the result. A method
subclasses it and defines `_compute_advantages(groups) -> (P, G)`.

Every rank takes the same steps in the same order, because each gather is a collective. TRL generates, scores and
gathers the rewards. The policy passes over the rows whose log-probs the method reads, then the reference over those
that need it. Advantages are computed from global tensors, identically on every rank; the mask is applied, and each
rank keeps its slice. Groups may straddle ranks. Finally, the generation is cut into new micro-batches
(`trl_capo.trainer.fast_step`).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
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

    Used directly, it is GRPO with calibration metrics. Hooks for a method, all optional: `_compute_advantages`,
    `_unmasked_advantages`, `_setup_method`, `needs_ref`, `_rows_needing_logps`, `_rows_needing_ref`,
    `_rows_with_advantage`, `_sequence_statistics`, `_token_advantages`, `_choose_prompts`, `_logps_from_logits`,
    `_calibration_arrays`, `_calibration_metrics`, `_method_state`, `_load_method_state`. The mask of
    `args.ref_ppl_mask` is not a hook: the trainer updates, applies, logs and saves it for every method.

    Raises:
        TypeError: `args` is not an instance of `config_class`. (This class itself also takes a plain `GRPOConfig`.)
        UserError: Bad input that would otherwise fail only during training; see `trl_capo.preflight`.
    """

    _tag_names = ["trl", "trl-capo", "grpo"]
    _logs: dict[str, Any]
    _replaces_advantages = False  # whether `_compute_advantages` starts from the weighted sum of the rewards

    def __init_subclass__(cls, **kwargs):
        """A method is named after its class unless it sets `_name`, and cites no paper unless it sets `_paper`."""
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
                f"multi_objective_aggregation={self.args.multi_objective_aggregation!r} changes how TRL computes "
                f"advantages, but {self._name} computes its own: set it to 'sum_then_normalize'."
            )

    @classmethod
    def needs_correct(cls, args: GroupAdvantageConfig) -> bool:
        return cls._replaces_advantages or super().needs_correct(args)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _setup_method(self) -> None:
        """What a method adds to the constructor. The rest of the trainer is already set up."""

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor | None:
        """Advantages of a generation, shape (P, G). None keeps TRL's."""
        return None

    def _unmasked_advantages(self, groups: RolloutGroups) -> Tensor | float:
        """Advantages added after the mask is applied, shape (P, G): what a dropped completion keeps."""
        return 0.0

    def _token_advantages(self, advantages: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This rank's advantages (B,) as they enter the loss; a method may make them (B, T)."""
        return advantages

    def _choose_prompts(self, inputs: list[dict]) -> list[dict]:
        """This rank's rows of a training generation, each prompt `num_generations` times. Must return as many rows."""
        return inputs

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        """Arrays of a generation that the method's own metrics need; each starts with the prompt axis."""
        return {}

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """The method's own metrics over the logging window, whose arrays are concatenated along the prompts."""
        return {}

    # Around a generation ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(self._choose_prompts(inputs) if self.model.training else inputs)

    def _after_scoring(self, output: Batch) -> tuple[Tensor, Tensor]:
        groups, per_token_logps, scored = self._build_groups(output)
        if self.model.training:
            self.mask.update(groups)
        groups = replace(groups, kept=self.mask.kept(groups))
        advantages = self._compute_advantages(groups)
        if advantages is not None:
            self._refuse_other_aggregations()
            self._check_shape(advantages, groups)
        elif self.mask.active:  # the mask drops from TRL's own
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
        return {
            "correct": groups.correct,
            # Whether training scores other groups depends on method and settings. Curves should be comparable.
            "mean_logps": groups.mean_logps.masked_fill(self.model.training & ~groups.mixed, torch.nan),
            "valid": groups.valid,
            "in_mixed_group": groups.mixed & groups.valid,
        }

    def _window_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        own = self._calibration_metrics(window)
        return {**super()._window_metrics(window), **self.mask.metrics(window), **own}

    def _check_shape(self, advantages: Tensor, groups: RolloutGroups) -> None:
        if advantages.shape != groups.rewards.shape:
            raise UserError(
                f"{type(self).__name__}._compute_advantages must return one advantage per completion, shape "
                f"{tuple(groups.rewards.shape)}, got {tuple(advantages.shape)}."
            )

    def _check_finite(self, advantages: Tensor) -> None:
        if not advantages.isfinite().all():
            raise UserError(
                f"{type(self).__name__}._compute_advantages returned an advantage that is not finite. mean_logps is "
                "NaN where groups.valid is False and outside _rows_needing_logps, ref_mean_logps outside "
                "_rows_needing_ref. Give those completions advantage 0, or include them in these hooks."
            )

    def _replace_advantages(self, output: dict[str, Tensor], advantages: Tensor) -> None:
        local = advantages[self._local_slice(output["advantages"].size(0))].to(output["advantages"])
        output["advantages"] = local
        logged = self._logs["advantages"]  # holds one training generation; an evaluation batch may be longer
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    # State -----------------------------------------------------------------------------------------------------------

    def _all_state(self) -> dict:
        return {**super()._all_state(), **self.mask.state()}

    def _load_all_state(self, state: dict) -> None:
        super()._load_all_state(state)
        self.mask.load_state(state)
