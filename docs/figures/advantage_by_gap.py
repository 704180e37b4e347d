"""Draws advantage_by_gap.png: how hard GRPO and CAPO push the right answer of a (right, wrong) pair.

    python docs/figures/advantage_by_gap.py

Two completions of one prompt, one right and one wrong, and nothing else: the advantage of the right one against its
lead in mean log-prob. All values come from `trl_capo.methods.advantages`. Needs matplotlib (the extra `report`).
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from trl_capo.methods.advantages import pairwise_logistic_advantages, reward_only_advantages


# tau, colour (Okabe and Ito's palette, safe for colour-blind readers), line style and where the label begins.
CAPO_CURVES = [
    (0.15, "#0072B2", "-", (-0.25, 0.87)),
    (0.6, "#009E73", "-", (0.84, 0.225)),
    (2.4, "#B4579A", "-.", (1.25, 0.400)),
]
GRPO_COLOR = "#D55E00"


def main() -> None:
    gaps = torch.linspace(-2, 2, 401, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(gaps), 2)
    mean_logps = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)  # only the difference matters

    plt.rcParams["font.size"] = 13
    figure, axes = plt.subplots(figsize=(8, 4.4), dpi=110, layout="constrained")
    axes.axvspan(-2, 0, color="0.95", zorder=0)

    grpo = reward_only_advantages(rewards, scale_rewards="none")[:, 0].abs()
    axes.plot(gaps, grpo, color=GRPO_COLOR, linewidth=2.6, linestyle=(0, (5, 2)))
    axes.text(1.97, 0.52, "GRPO, whatever the gap", color=GRPO_COLOR, ha="right")
    for tau, color, linestyle, label_at in CAPO_CURVES:
        advantages = pairwise_logistic_advantages(rewards, mean_logps, tau)[:, 0].abs()
        axes.plot(gaps, advantages, color=color, linewidth=2.6, linestyle=linestyle)
        axes.text(*label_at, f"CAPO, tau {tau:g}", color=color)

    for x, align, text in ((-1.95, "left", "wrong answer is surer"), (1.95, "right", "right answer is surer")):
        axes.text(x, 1.07, text, ha=align, color="0.3", style="italic")
    axes.set(xlim=(-2, 2), ylim=(0, 1.16), xticks=range(-2, 3), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("lead of the right answer in mean log-prob (nats)")
    axes.set_ylabel("|advantage| of the right answer")
    axes.spines[["top", "right"]].set_visible(False)

    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, metadata={"Software": None})
    print(f"Wrote {path} ({path.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
