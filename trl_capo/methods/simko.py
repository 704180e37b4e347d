"""SimKO, simple pass@K optimisation (arXiv 2510.14807): keeps a policy from concentrating on its likeliest token.

It acts at forking tokens, whose entropy is above the 0.8 quantile of their completion:

    right completion:  grad log pi(y)  becomes  (1 - a) grad log pi(y) + a/K sum over the top K of grad log pi(k)
    wrong completion:  grad log pi(y)  is multiplied by 1.1 where y is the likeliest token

Everything else is GRPO. A surrogate replaces each token's log-prob: it has the same value but this gradient, so the
importance ratio and its clipping do not change. The released code mixes ratios to the old policy; in the gradient the
old top-K log-probs cancel, so only the current ones are needed. SimKO works on any advantages, including CAPO's
(`CAPOSimKOTrainer`).

Source: the released code, where a token exactly at the quantile does not fork. The sign of the advantage says whether
a completion is right or wrong. The code's configuration also has an entropy bonus of 0.001, which one script resets
and another does not. The bonus has no gradient in the released code, so it is left out here.

Cost: top K needs all logits of a micro-batch at once, (B, T, vocabulary) in float32, and their gradient; TRL's fused
head never holds them. With a vocabulary of 152,000 that is 15 GB for 8 completions of 3,072 tokens, twice.

Degenerate cases: with a = 0 and a penalty of 1, SimKO is GRPO. A completion of one token, or with equal entropies
everywhere, does not fork.
"""

from dataclasses import dataclass, field

from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.capo import CAPOTrainer
from trl_capo.methods.capo_config import CAPOConfig
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.config import GroupAdvantageConfig


def surrogate_logps(
    logps: Tensor,
    entropies: Tensor,
    tokens: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    top_k: int = 3,
    mix: float = 0.01,
    quantile: float = 0.8,
    penalty: float = 1.1,
) -> Tensor:
    """Log-probs of the tokens, with SimKO's gradient.

    Args:
        logps: Log-probs of the vocabulary at each position, shape (B, T, V).
        entropies: Entropy at each position, shape (B, T).
        tokens: Sampled tokens, shape (B, T).
        mask: 1 = part of the completion, shape (B, T).
        advantages: Advantage of each completion, shape (B,). Its sign says whether the completion is right.
        top_k: K.
        mix: a, the share of the gradient that goes to the top K tokens.
        quantile: Quantile of a completion's entropies above which a token forks.
        penalty: Factor on the gradient where a wrong completion took the likeliest token.

    Returns:
        Surrogates, shape (B, T), equal in value to the log-probs of `tokens`.

    Source: arXiv 2510.14807.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 2, requires_grad=True)
        >>> entropies, tokens, mask = torch.tensor([[0.1, 0.6]]), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
        >>> options = dict(top_k=2, mix=0.5)
        >>> surrogate_logps(logits.log_softmax(-1), entropies, tokens, mask, torch.ones(1), **options).sum().backward()
        >>> logits.grad[0].tolist()  # the second token forks: half, because the mean over both has no gradient
        [[0.5, -0.5], [0.25, -0.25]]
    """
    token_logps = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    threshold = entropies.masked_fill(mask == 0, float("nan")).nanquantile(quantile, dim=1, keepdim=True)
    forking = (entropies > threshold) & (mask != 0)
    likeliest = logps.argmax(-1) == tokens
    right, wrong = (advantages > 0).unsqueeze(1), (advantages < 0).unsqueeze(1)

    mixed = mix * (logps.topk(top_k).values.mean(-1) - token_logps)
    pushed = (penalty - 1) * token_logps
    change = mixed * (forking & right) + pushed * (forking & likeliest & wrong)
    return token_logps + change - change.detach()


@dataclass
class SimKOOptions:
    """Options of SimKO's loss, in addition to those of the advantages.

    Parameters:
        simko_top_k (`int`, *optional*, defaults to `3`):
            Number of likeliest tokens that share a right completion's gradient.
        simko_mix (`float`, *optional*, defaults to `0.01`):
            Share of the gradient that these tokens get.
        simko_quantile (`float`, *optional*, defaults to `0.8`):
            A token forks if its entropy is above this quantile of its completion's entropies.
        simko_penalty (`float`, *optional*, defaults to `1.1`):
            Factor on the gradient where a wrong completion took the likeliest token.
    """

    simko_top_k: int = field(
        default=3, metadata={"help": "Number of likeliest tokens that share a right completion's gradient."}
    )
    simko_mix: float = field(default=0.01, metadata={"help": "Share of the gradient that these tokens get."})
    simko_quantile: float = field(default=0.8, metadata={"help": "Entropy quantile above which a token forks."})
    simko_penalty: float = field(
        default=1.1, metadata={"help": "Factor on the gradient where a wrong completion took the likeliest token."}
    )

    def __post_init__(self):
        if self.simko_top_k < 1 or not 0 <= self.simko_mix <= 1 or not 0 <= self.simko_quantile <= 1:
            raise UserError(
                "simko_top_k must be at least 1, and simko_mix and simko_quantile must lie in [0, 1]; got "
                f"{self.simko_top_k}, {self.simko_mix} and {self.simko_quantile}."
            )
        if self.simko_penalty <= 0:
            raise UserError(
                f"simko_penalty must be positive, or it would reward wrong answers; got {self.simko_penalty}."
            )
        super().__post_init__()
        if self.beta != 0:
            raise UserError(f"SimKO would also change the gradient of the KL term: set beta=0, got {self.beta}.")


@dataclass
class SimKOConfig(SimKOOptions, GroupAdvantageConfig):
    """Configuration of `SimKOTrainer`: `SimKOOptions` and `GroupAdvantageConfig`."""


@dataclass
class CAPOSimKOConfig(SimKOOptions, CAPOConfig):
    """Configuration of `CAPOSimKOTrainer`: `SimKOOptions` and `CAPOConfig`."""


class SimKOLoss:
    """Mixin that computes SimKO's loss on the advantages of the class it is mixed into."""

    args: SimKOOptions
    _reads_logits = True

    def _logps_from_logits(self, logps: Tensor, entropies: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        args, mask = self.args, inputs["completion_mask"] * inputs.get("tool_mask", 1)
        return surrogate_logps(
            logps,
            entropies,
            inputs["completion_ids"],
            mask,
            inputs["advantages"],
            top_k=args.simko_top_k,
            mix=args.simko_mix,
            quantile=args.simko_quantile,
            penalty=args.simko_penalty,
        )


class SimKOTrainer(SimKOLoss, GRPO):
    """`GRPOTrainer` with SimKO's loss; takes a `SimKOConfig`."""

    args: SimKOConfig
    config_class = SimKOConfig
    _tag_names = ["trl", "trl-capo", "simko"]
    _name = "SimKO"
    _paper = {"title": "SimKO: Simple Pass@K Policy Optimization", "id": "2510.14807"}


class CAPOSimKOTrainer(SimKOLoss, CAPOTrainer):
    """SimKO's loss on CAPO's advantages; takes a `CAPOSimKOConfig`."""

    args: CAPOSimKOConfig
    config_class = CAPOSimKOConfig
    _tag_names = ["trl", "trl-capo", "capo", "simko"]
    _name = "CAPO + SimKO"
