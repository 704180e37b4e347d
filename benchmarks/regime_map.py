"""Where does GRPO lower the AUC of its base, and where does CAPO help? A map, in a policy of 17 parameters.

    python benchmarks/regime_map.py              # results/regime_map.json, .md and docs/figures/regime_map.png

The policy answers questions of two steps. Whatever matters in the arithmetic world is one parameter here:

    sharpness (1)          Factor on the logits of all steps that the policy is unsure about, and of its style. Each
                           such step has eight results with random scores; the right one's are higher on average.
    misconceptions (12)    In a `share` of the steps the policy follows a wrong rule with probability `strength`.
                           There are twelve contexts; what is learnt about one of them helps in all its steps.
    style (4)              Three free choices among four symbols that say nothing about correctness.

Samples are right if both steps are. Confidence is the mean log-prob, where the tokens that the policy is certain of
count as zero. Training and evaluation prompts are drawn anew and independently, so nothing can be memorised. Adam,
300 steps of 32 prompts x 8 completions, one seed; evaluation on 1,000 prompts x 16. GRPO divides by the standard
deviation; CAPO has no mask.

What it leaves out: a network in which everything is shared with everything. Its numbers show directions, not sizes.
"""

import argparse
import json
import math
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm

from trl_capo.calibration.metrics import auc_within
from trl_capo.methods.advantages import pairwise_logistic_advantages, reward_only_advantages


RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "regime_map.png"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.75)
STRENGTHS = (0.4, 0.6, 0.8, 0.9, 0.97)
TAUS = (0.5, 0.25, 0.12)
SEEDS = (0,)
# Shipped worlds: share of the steps in which their wrong rule applies, and how often it is followed there.
WORLDS = {"slips": (0.75, 0.4), "flat": (0.0, 0.4), "misconceptions": (0.075, 0.8)}
STEPS, CONTEXTS, RESULTS_OF_A_STEP, CHOICES = 2, 12, 8, 3
CERTAIN_TOKENS = 3  # in a step
KNOWLEDGE = (4.0, 2.0)  # lead of the right result, and spread of all, before sharpness
STYLE = (0.7, 0.2, 0.07, 0.03)
IMPOSSIBLE = -30.0


class Policy:
    """The parameters, and samples with their mean log-probs."""

    def __init__(self, strength: float, sharpness: float):
        self.log_sharpness = torch.tensor(math.log(sharpness))
        self.rules = torch.full((CONTEXTS,), math.log((1 - strength) / strength))  # log-odds of the right result
        self.style = torch.tensor(STYLE).log()
        self.parameters = [self.log_sharpness, self.rules, self.style]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def sample(self, prompts: tuple[torch.Tensor, ...], num: int, generator: torch.Generator):
        """Correctness and mean log-prob of `num` completions of each prompt, (P, G) both."""
        is_rule, context, scores = prompts
        rule = torch.full_like(scores, IMPOSSIBLE)
        rule[..., 1] = 0.0
        rule = torch.cat([self.rules[context].unsqueeze(-1), rule[..., 1:]], dim=-1)
        sharpness = self.log_sharpness.exp()
        results = log_softmax(torch.where(is_rule.unsqueeze(-1), rule, sharpness * scores), dim=-1)  # (P, K, A)
        drawn = torch.multinomial(results.detach().exp().flatten(0, 1), num, replacement=True, generator=generator)
        drawn = drawn.view(len(scores), STEPS, num)
        style = log_softmax(sharpness * self.style, dim=-1)
        choices = torch.multinomial(
            style.detach().exp().expand(len(scores) * num, -1), CHOICES, replacement=True, generator=generator
        )
        logps = results.gather(2, drawn).sum(dim=1) + style[choices].sum(dim=1).view(len(scores), num)
        return (drawn == 0).all(dim=1).float(), logps / (CERTAIN_TOKENS * STEPS + CHOICES)


def draw_prompts(num: int, share: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Where the wrong rule applies (P, K), its context (P, K), and the scores of all results (P, K, A)."""
    is_rule = torch.rand(num, STEPS, generator=generator) < share
    context = torch.randint(CONTEXTS, (num, STEPS), generator=generator)
    scores = KNOWLEDGE[1] * torch.randn(num, STEPS, RESULTS_OF_A_STEP, generator=generator)
    scores[..., 0] += KNOWLEDGE[0]
    return is_rule, context, scores


def train(
    tau: float | None, share: float, strength: float, seed: int, *, sharpness: float = 0.3, steps: int = 300
) -> list[tuple[float, float]]:
    """Accuracy and AUC within prompts, before training and after every 25 steps.

    Args:
        tau: CAPO's; None trains by GRPO.
        share: Share of steps with a wrong rule.
        strength: Probability of following it.
        seed: Seed of prompts and samples.
        sharpness: Of the base.
        steps: Optimizer steps.
    """
    policy, generator = Policy(strength, sharpness), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters, lr=0.02)
    test, curve = draw_prompts(1000, share, torch.Generator().manual_seed(999)), []
    for step in range(steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                correct, scores = policy.sample(test, 16, torch.Generator().manual_seed(5))
            curve.append((correct.mean().item(), float(auc_within(correct.numpy(), scores.numpy()))))
        rewards, mean_logps = policy.sample(draw_prompts(32, share, generator), 8, generator)
        if tau is None:
            advantages = reward_only_advantages(rewards, scale_rewards="group")
        else:
            advantages = pairwise_logistic_advantages(rewards, mean_logps.detach(), tau, normalization="group")
        optimizer.zero_grad()
        (-(advantages * mean_logps).mean()).backward()
        optimizer.step()
    return curve


def at_accuracy(curve: np.ndarray, level: float) -> float:
    """AUC where a curve (checkpoints, 2) first reaches an accuracy; NaN if it never does."""
    for (before, auc_before), (after, auc_after) in zip(curve, curve[1:], strict=False):
        if before <= level <= after:
            share = (level - before) / (after - before) if after > before else 0.0
            return auc_before + share * (auc_after - auc_before)
    return float("nan")


def cell(share: float, strength: float) -> dict[str, float]:
    """GRPO against its base, and CAPO against GRPO, with the best tau among those at most two points less accurate."""
    grpo = np.mean([train(None, share, strength, seed) for seed in SEEDS], axis=0)
    fair = {}
    for tau in TAUS:
        capo = np.mean([train(tau, share, strength, seed) for seed in SEEDS], axis=0)
        fair[tau] = (capo, capo[-1, 0] - grpo[-1, 0])
    close = [tau for tau, (_, gap) in fair.items() if gap > -0.02] or [max(TAUS)]
    tau = max(close, key=lambda tau: fair[tau][0][-1, 1])
    capo = fair[tau][0]
    level = min(capo[-1, 0], grpo[-1, 0])
    return {
        "share": share,
        "strength": strength,
        "base": grpo[0].tolist(),
        "grpo": grpo[-1].tolist(),
        "capo": capo[-1].tolist(),
        "tau": tau,
        "grpo_minus_base": float(grpo[-1, 1] - grpo[0, 1]),
        "capo_minus_grpo": float(capo[-1, 1] - grpo[-1, 1]),
        "accuracy_gap": float(capo[-1, 0] - grpo[-1, 0]),
        "at_matched_accuracy": float(at_accuracy(capo, level) - at_accuracy(grpo, level)),
    }


def as_table(cells: list[dict]) -> str:
    header = ["share", "strength", "base: accuracy / AUC", "GRPO", "CAPO", "its tau", "GRPO - base: AUC"]
    header += ["CAPO - GRPO: accuracy", "AUC", "AUC at matched accuracy"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for c in cells:
        pairs = [" / ".join(f"{number:.3f}" for number in c[name]) for name in ("base", "grpo", "capo")]
        gaps = [c[name] for name in ("grpo_minus_base", "accuracy_gap", "capo_minus_grpo", "at_matched_accuracy")]
        row = [c["share"], c["strength"], *pairs, c["tau"], *(f"{gap:+.3f}" for gap in gaps)]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def draw(cells: list[dict], path: Path) -> None:
    """Three maps over share and strength, with the shipped worlds marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "grpo_minus_base": "AUC: GRPO - base",
        "capo_minus_grpo": "AUC: CAPO - GRPO, at the end",
        "at_matched_accuracy": "AUC: CAPO - GRPO, at matched accuracy",
    }
    label = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.array([c[name] for c in cells]).reshape(len(SHARES), len(STRENGTHS)).T
        image = axis.imshow(values, origin="lower", cmap="RdBu", vmin=-0.25, vmax=0.25, aspect="auto")
        for (y, x), number in np.ndenumerate(values):
            color = "white" if abs(number) > 0.17 else "black"
            axis.text(x, y - 0.15, f"{number:+.2f}", ha="center", va="center", fontsize=8, color=color)
        for world, (share, strength) in WORLDS.items():
            x = np.interp(share, SHARES, range(len(SHARES)))
            y = np.interp(strength, STRENGTHS, range(len(STRENGTHS)))
            axis.annotate(world, (x, y), (x, y + 0.15), ha="center", fontsize=8, weight="bold", bbox=label)
        axis.set_title(title)
        axis.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        axis.set_yticks(range(len(STRENGTHS)), [f"{strength:.0%}" for strength in STRENGTHS])
        axis.set_xlabel("share of steps with a wrong rule")
    axes[0].set_ylabel("how often the rule is followed")
    figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args(argv)
    torch.set_num_threads(1)
    started = time.time()
    cells = [cell(share, strength) for share in tqdm(SHARES, unit="share") for strength in STRENGTHS]
    RESULTS.mkdir(exist_ok=True)
    summary = {"cells": cells, "date": date.today().isoformat(), "seconds": round(time.time() - started)}
    (RESULTS / "regime_map.json").write_text(json.dumps(summary, indent=1))
    (RESULTS / "regime_map.md").write_text(as_table(cells))
    draw(cells, FIGURE)
    print(as_table(cells))


if __name__ == "__main__":
    main()
