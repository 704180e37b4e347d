"""Options of CAPO. Defaults are the paper's (arXiv 2604.12632, Qwen2.5-Math-1.5B)."""

import math
import warnings
from dataclasses import dataclass, field

from trl_capo.errors import UserError
from trl_capo.methods.advantages import NORMALIZATIONS
from trl_capo.trainer.config import GroupAdvantageConfig


# Losses whose gradient at the sampling policy is that of the mean token log-prob, the score that CAPO ranks.
SEQUENCE_MEAN_LOSSES = ("grpo", "sapo")


@dataclass
class CAPOConfig(GroupAdvantageConfig):
    """Configuration of `CAPOTrainer`: TRL's `GRPOConfig`, plus how completions are compared, masked and labelled.

    Four defaults of `GRPOConfig` are set to the paper's values: `loss_type="grpo"` (the mean over each sequence,
    whose gradient is that of the mean token log-prob, the score that CAPO ranks), `beta=0.0`, `epsilon=0.2` and
    `temperature=1.0`. `num_generations=8` and `learning_rate=1e-6` are TRL's own defaults. `scale_rewards` has no
    effect, because CAPO replaces the advantages that it shapes.

    Parameters:
        > Parameters that control the comparison of completions

        tau (`float`, *optional*, defaults to `0.6`):
            Temperature of the pairwise logistic loss, > 0. Choose it on the scale of the gaps in mean log-prob
            between right and wrong answers: once a pair is settled by a few tau, it gives no more gradient.
        tau_end (`float`, *optional*):
            Tau at the end of training, > 0, in the unit of `tau`. Tau then moves there from `tau` by an equal factor
            every step. None keeps it constant (paper). A tau that starts high and falls learns like GRPO at first.
        reward_only_share (`float`, *optional*, defaults to `0.0`):
            Share, in [0, 1], of the advantages that an infinite tau would give: those of GRPO without std, on the
            scale of `pair_normalization`. 0 is CAPO (paper), 1 ignores confidence. It trades AUC for accuracy: pairs
            that are settled go on pushing with half this share.
        tau_unit (`str`, *optional*, defaults to `"nats"`):
            `"nats"`: tau is in nats. `"gap"`: tau is a multiple of the median absolute gap in mean log-prob over the
            (correct, wrong) pairs of the first mixed groups (at least 256 pairs), estimated once and then frozen.
        pair_normalization (`str`, *optional*, defaults to `"sum"`):
            `"sum"` over the members with a different reward (paper), `"group"` (divided by the number of valid
            members), `"opposite_mean"` or `"std"`. See
            `trl_capo.methods.advantages.pairwise_logistic_advantages`.
        scale_by_tau (`bool`, *optional*, defaults to `False`):
            Multiply the advantages by 1/tau, which gives the exact gradient of the logistic loss.
        pair_scope (`str`, *optional*, defaults to `"group"`):
            `"group"` compares answers to one prompt (paper). `"batch"` adds pairs across prompts, which teach the
            model which questions it knows. `"batch"` needs `pair_normalization="sum"`.

        > Parameters that control the reference-perplexity mask

        ref_ppl_mask (`bool`, *optional*, defaults to `True`):
            CAPO's mask. For its thresholds, see `ref_ppl_low`, `ref_ppl_high` and `ref_ppl_quantiles` in
            `GroupAdvantageConfig`.
        mask_partners (`bool`, *optional*, defaults to `False`):
            Also drop masked completions from their partners' sums. A group's advantages then sum to zero.

        > Parameters that control labels and other rewards

        graded_rewards (`bool`, *optional*, defaults to `False`):
            Use the correctness reward, in [0, 1], as the label, instead of turning it into 0 or 1 by
            `correct_threshold`.
        auxiliary_rewards (`str`, *optional*, defaults to `"add"`):
            With several reward functions, `"add"` adds each of the others to CAPO's advantages, minus its group mean
            and times its weight in `reward_weights`; `"ignore"` only logs them. The correctness reward's own weight
            has no effect.
    """

    loss_type: str = field(
        default="grpo",
        metadata={"help": "TRL's loss. CAPO's theory needs `grpo`, the mean over each sequence."},
    )
    tau: float = field(
        default=0.6,
        metadata={
            "help": "Temperature of the pairwise logistic loss, > 0. Choose it on the scale of the gaps in mean "
            "log-prob."
        },
    )
    tau_end: float | None = field(
        default=None,
        metadata={"help": "Tau at the end of training: it moves there from `tau` by an equal factor every step."},
    )
    reward_only_share: float = field(
        default=0.0,
        metadata={"help": "Share, in [0, 1], of the advantages of GRPO without std: trades AUC for accuracy."},
    )
    tau_unit: str = field(
        default="nats",
        metadata={
            "help": "`nats`: tau is in nats. `gap`: tau is a multiple of the median absolute gap in mean log-prob "
            "over the (correct, wrong) pairs of the first mixed groups, estimated once.",
            "choices": ["nats", "gap"],
        },
    )
    pair_normalization: str = field(
        default="sum",
        metadata={
            "help": "`sum` over the members with a different reward (paper), `group`, `opposite_mean` or `std`.",
            "choices": list(NORMALIZATIONS),
        },
    )
    scale_by_tau: bool = field(default=False, metadata={"help": "Multiply the advantages by 1/tau."})
    pair_scope: str = field(
        default="group",
        metadata={
            "help": "`group` compares answers to one prompt (paper); `batch` adds pairs across prompts.",
            "choices": ["group", "batch"],
        },
    )
    ref_ppl_mask: bool = field(
        default=True,
        metadata={
            "help": "Drop correct completions that surprise the reference model and wrong ones that it finds likely. "
            "If False and beta=0, no reference model is loaded."
        },
    )
    mask_partners: bool = field(
        default=False, metadata={"help": "Also drop masked completions from their partners' sums."}
    )
    graded_rewards: bool = field(
        default=False,
        metadata={"help": "Use the correctness reward, in [0, 1], as the label, instead of 0 or 1."},
    )
    auxiliary_rewards: str = field(
        default="add",
        metadata={
            "help": "What to do with the other reward functions: `add` their weighted, group-centred values to CAPO's "
            "advantages, or `ignore` them.",
            "choices": ["add", "ignore"],
        },
    )

    def __post_init__(self):
        self._check_comparison()
        super().__post_init__()
        self._warn_about_departures()

    def _check_comparison(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise UserError(
                f"num_generations must be at least 2, got {self.num_generations}: CAPO compares the completions of a "
                "prompt with each other."
            )
        for name, value in (("tau", self.tau), ("tau_end", self.tau_end)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be positive and finite, got {value}.")
        if not 0 <= self.reward_only_share <= 1:
            raise UserError(f"reward_only_share must be in [0, 1], got {self.reward_only_share}.")
        if self.pair_scope == "batch" and self.pair_normalization != "sum":
            raise UserError(
                f"pair_scope='batch' needs pair_normalization='sum', got {self.pair_normalization!r}: the other "
                "normalisations are defined within one group."
            )

    def _warn_about_departures(self) -> None:
        """Warn about settings that work but do not do what the paper describes."""
        if self.loss_type not in SEQUENCE_MEAN_LOSSES:
            _warn(
                f"loss_type={self.loss_type!r} does not follow the gradient of the mean token log-prob, the score "
                "that CAPO ranks. Use loss_type='grpo' unless you have a reason not to."
            )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
