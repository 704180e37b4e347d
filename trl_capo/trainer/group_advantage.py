"""The trainer that methods extend: one pure function of whole groups replaces TRL's advantages.

TRL computes advantages inline and offers no hook for them. `GroupAdvantageTrainer` lets TRL do all its work, then
passes the whole batch as groups to one pure function and replaces TRL's advantages with the result. A method
subclasses it and defines `_compute_advantages(groups) -> (P, G)`.

Every rank takes the same steps in the same order, because each gather is a collective. If asked for, prompts are
chosen (`prompt_selection.py`). TRL generates, scores and gathers the rewards. The policy passes over the rows whose
log-probs the method reads, then the reference over those that need it. Advantages are computed from global tensors,
identically on every rank; the mask is applied, and each rank keeps its slice. Groups may straddle ranks. Finally, the
generation is cut into new micro-batches (`fast_step.py`).
"""

import copy
import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from trl_capo.calibration import metrics
from trl_capo.errors import UserError
from trl_capo.ranks import agree
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.groups import RolloutGroups, differ
from trl_capo.trainer.idle import IdleWatch
from trl_capo.trainer.metrics import CalibrationLogging
from trl_capo.trainer.prompt_selection import PromptSelection
from trl_capo.trainer.repack import Batch
from trl_capo.trainer.scoring import GroupScoringTrainer


class GroupAdvantageTrainer(CalibrationLogging, GroupScoringTrainer):
    """`GRPOTrainer` whose advantages may depend on whole groups. Takes the same arguments.

    Used directly, it is GRPO with calibration metrics. Hooks for a method, all optional: `_compute_advantages`,
    `_unmasked_advantages`, `_setup_method`, `needs_correct`, `needs_ref`, `_rows_needing_logps`, `_rows_needing_ref`,
    `_sequence_statistics`, `_own_passes`, `_token_advantages`, `_choose_prompts`, `generations_per_batch`,
    `_logps_from_logits` with `_reads_logits`, `_calibration_arrays`, `_calibration_metrics`, `_method_state`,
    `_load_method_state`. The mask of `args.ref_ppl_mask` is not a hook: the trainer updates, applies, logs and saves
    it for every method.

    Raises:
        TypeError: `args` is not an instance of `config_class`. (This class itself also takes a plain `GRPOConfig`.)
        UserError: Bad input that would otherwise fail only during training; see `trl_capo.preflight`.
    """

    _tag_names = ["trl", "trl-capo", "grpo"]
    _logs: dict[str, Any]

    def __init_subclass__(cls, **kwargs):
        """A method is named after its class unless it sets `_name`, and cites no paper unless it sets `_paper`."""
        super().__init_subclass__(**kwargs)
        if GroupAdvantageTrainer in cls.__bases__:
            cls._name = cls.__dict__.get("_name", cls.__name__.removesuffix("Trainer"))
            cls._paper = cls.__dict__.get("_paper", {})

    def _finish_init(self) -> None:
        super()._finish_init()
        self._idle_watch = IdleWatch()
        if self._defines("_compute_advantages"):
            self._refuse_other_aggregations()
        if self._is_vlm and type(self)._own_passes is not GroupAdvantageTrainer._own_passes:
            raise UserError(f"{self._name} needs passes of its own over text, which do not work with an image model.")
        self._setup_method()

    def _refuse_other_aggregations(self) -> None:
        if self.args.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation={self.args.multi_objective_aggregation!r} changes how TRL computes "
                f"advantages, but {self._name} computes its own: set it to 'sum_then_normalize'."
            )

    @classmethod
    def _defines(cls, hook: str) -> bool:
        """Whether a method defines a hook of this class, in itself or in any parent."""
        return any(hook in vars(kind) for kind in cls.__mro__ if kind is not GroupAdvantageTrainer)

    @classmethod
    def needs_correct(cls, args: GroupAdvantageConfig) -> bool:
        return cls._defines("_compute_advantages") or cls._defines("_unmasked_advantages")

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

    def train(self, *args, **kwargs):
        """As TRL; see `ResumableGRPOTrainer`."""
        if self.selection is not None:
            self.selection.uses = 0  # an earlier training may have ended between two generations for the same prompts
        return super().train(*args, **kwargs)

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
        selection = self.selection
        if selection is None:
            return inputs
        if selection.uses % self.generations_per_batch(self.args) == 0:
            # One choice for all: other processors may round the same scores in another order.
            selection.chosen, selection.uses = agree(lambda: selection.choose(self.num_generations)), 0
        selection.uses += 1
        rows = [row for row, _ in selection.chosen for _ in range(self.num_generations)]
        local = rows[self._local_slice(len(inputs))]
        dataset = cast(Dataset, self.train_dataset)
        read = {row: dataset[row] for row in dict.fromkeys(local)}
        return [{name: copy.deepcopy(read[row][name]) for name in inputs[0]} for row in local]

    def _learn_of_prompts(self, selection: PromptSelection, groups: RolloutGroups) -> None:
        if self.needs_correct(self.args):
            rewards, taught = groups.correct, groups.mixed
        else:
            rewards, taught = groups.rewards, differ(groups.rewards)
        rewards = rewards.masked_fill(~groups.valid, torch.nan)
        selection.update(self._prompt_numbers, rewards.cpu().numpy(), taught.squeeze(1).cpu().numpy())

    def _after_scoring(self, output: Batch) -> tuple[Tensor, Tensor]:
        groups, per_token_logps, scored = self._build_groups(output)
        if self.model.training:
            self.mask.update(groups)
            if self.selection is not None:
                self._learn_of_prompts(self.selection, groups)
        groups = replace(groups, kept=self.mask.kept(groups))
        advantages = self._compute_advantages(groups)
        if advantages is None:  # TRL's own
            advantages = self.accelerator.gather(output["advantages"]).view(groups.valid.shape)
        else:
            self._refuse_other_aggregations()
            self._check_shape(advantages, groups)
            self._check_judged(advantages, groups)
        advantages = advantages.masked_fill(~groups.kept, 0.0) + self._unmasked_advantages(groups)
        self._check_finite(advantages)
        if self.model.training:
            self._watch_for_idleness(advantages, groups)
        self._replace_advantages(output, advantages.flatten())
        by_token = self._token_advantages(output["advantages"], output)
        self._check_by_token(by_token, output)
        dropped = (~groups.kept & (advantages == 0)).flatten()[self._local_slice(len(by_token))]
        output["advantages"] = by_token.masked_fill(dropped.view(-1, *[1] * (by_token.dim() - 1)), 0.0)
        if self._correctness_index is None:
            return per_token_logps, scored
        arrays = {**self._group_arrays(groups), **self.mask.arrays(groups), **self._calibration_arrays(groups)}
        self._remember({name: array.float().cpu().numpy() for name, array in arrays.items()})
        return per_token_logps, scored

    def _watch_for_idleness(self, advantages: Tensor, groups: RolloutGroups) -> None:
        fractions = metrics.group_fractions(groups.correct.cpu().numpy(), valid=groups.valid.cpu().numpy())
        right_and_wrong = fractions["frac_all_correct"], fractions["frac_all_wrong"]
        if self._correctness_index is None:
            right_and_wrong = math.nan, math.nan
        line = self._idle_watch.update(bool((advantages != 0).any()), *right_and_wrong)
        if line:
            self.accelerator.print(line)

    def _group_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        uniform = {}
        if self.model.training and self.selection is not None:
            uniform = {"drawn_uniformly": torch.tensor(self.selection.drawn_uniformly(self._prompt_numbers))}
        return uniform | {
            "correct": groups.correct,
            # Whether training scores other groups depends on method and settings. Curves should be comparable.
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
                f"{type(self).__name__}._compute_advantages must return one advantage per completion, shape "
                f"{tuple(groups.rewards.shape)}, got {tuple(advantages.shape)}."
            )

    def _check_judged(self, advantages: Tensor, groups: RolloutGroups) -> None:
        if math.isnan(self.mask.thresholds[0]) or groups.ref_mean_logps is None:
            return
        judgeable = groups.valid & groups.correct.isfinite()
        if (judgeable & groups.ref_mean_logps.isnan() & (advantages != 0)).any():
            raise UserError(
                f"{type(self).__name__}._compute_advantages gives an advantage to a completion that has no reference "
                "perplexity for the mask: let _rows_needing_logps name all completions that may have an advantage."
            )

    def _check_finite(self, advantages: Tensor) -> None:
        if not advantages.isfinite().all():
            raise UserError(
                f"{type(self).__name__} has an advantage that is not finite. In groups, mean_logps is NaN where valid "
                "is False and outside _rows_needing_logps, ref_mean_logps outside _rows_needing_ref, and rewards, "
                "rewards_per_func and correct where a function returned None: give those completions advantage 0 in "
                "_compute_advantages and _unmasked_advantages, or let the hooks name them."
            )

    def _check_by_token(self, advantages: Tensor, output: Batch) -> None:
        shapes = output["advantages"].shape, output["completion_mask"].shape
        if advantages.shape not in shapes or not advantages.isfinite().all():
            raise UserError(
                f"{type(self).__name__}._token_advantages must return finite numbers, also at padding, of shape "
                f"{tuple(shapes[0])} or {tuple(shapes[1])}, got {tuple(advantages.shape)}"
                f"{'' if advantages.isfinite().all() else ' with values that are not finite'}."
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
        selection = {} if self.selection is None else {"prompt_selection": self.selection.state()}
        return {**super()._all_state(), **self.mask.state(), **selection}

    def _load_all_state(self, state: dict) -> None:
        super()._load_all_state(state)
        self.mask.load_state(state)
        if self.selection is not None and "prompt_selection" in state:
            self.selection.load_state(state["prompt_selection"])
        elif self.selection is not None:
            self.accelerator.print(
                "⚠️ The checkpoint was written with prompt_selection='uniform': nothing is known of the prompts yet."
            )
