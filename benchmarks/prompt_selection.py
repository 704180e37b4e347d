"""How many completions teach something, by how prompts are chosen? Simulated with pass rates of the arithmetic base.

    python benchmarks/prompt_selection.py        # three minutes on one core

The base answers 1,536 training prompts 32 times. Then nothing is trained: every generation of 32 prompts x 8 draws its
outcomes from these, so that ways of choosing can be compared in seconds, on the same policy. The share is that of
completions in groups that are neither all right nor all wrong, in all generations and by part of the run.

    uniform             every prompt with the same probability
    informative         `trl_capo.trainer.prompt_selection`, as the trainer uses it
    own groups only     without the prediction from the text: every prompt starts alike, as in MoPPS
    text only           without the prompt's own groups
    N candidates        with another `prompt_candidates`
    ... + screening     half of each group first; the other half only where a mixed group is still likely (posterior
                        probability above 0.5), until as many completions were generated as without screening

Results go to `benchmarks/results/prompt_selection.md` and `.json`.
"""

import os
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
from arithmetic_study import grade_boxes
from tqdm import tqdm

from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
from trl_capo.files import write_json, write_text
from trl_capo.trainer import prompt_selection
from trl_capo.trainer.prompt_selection import PromptSelection


RESULTS = Path(__file__).parent / "results"
NUM_PROMPTS, NUM_GENERATIONS, GENERATIONS, SEEDS = 32, 8, 60, range(5)
PARTS = {"first 5": slice(0, 5), "next 15": slice(5, 20), "last 40": slice(20, None), "all": slice(None)}
VARIANTS: dict[str, dict] = {
    "uniform": dict(learn=False),
    "uniform + screening": dict(learn=False, screening=True),
    "own groups only": dict(text=False),
    "text only": dict(own=False),
    "informative": dict(),
    "informative + screening": dict(screening=True),
    "2 candidates": dict(candidates=2),
    "4 candidates": dict(candidates=4),
    "16 candidates": dict(candidates=16),
}


def main() -> None:
    prompts, outcomes, encode = answers_of_the_base()
    rows = {}
    for name, options in tqdm(VARIANTS.items(), desc="Choosing", unit="variant"):
        runs = [simulate(prompts, outcomes, encode, seed, **options) for seed in SEEDS]
        shares = np.array([shares for shares, _ in runs])
        row = {part: float(shares[:, where].mean()) for part, where in PARTS.items()}
        deviation = float(shares.mean(axis=1).std(ddof=1))
        rows[name] = row | {"deviation": deviation, "seconds": float(np.mean([seconds for _, seconds in runs]))}
    source = {"date": date.today().isoformat(), "machine": f"{platform.machine()} CPU, one thread of {os.cpu_count()}"}
    source |= {"seeds": len(SEEDS), "uniform_pass_rate": float(outcomes.mean())}
    write_json(RESULTS / "prompt_selection.json", source | {"variants": rows})
    lines = [
        f"# Completions that teach, by how prompts are chosen ({source['date']})",
        "",
        f"`python benchmarks/prompt_selection.py`, {source['machine']}. Means over {len(SEEDS)} seeds; deviation: "
        "of a run's mean between seeds.",
        "",
        f"| variant | {' | '.join(PARTS)} | deviation | seconds a choice |",
        "|---" * (len(PARTS) + 3) + "|",
    ]
    for name, row in rows.items():
        shares = " | ".join(f"{row[part]:.3f}" for part in PARTS)
        lines.append(f"| {name} | {shares} | {row['deviation']:.3f} | {row['seconds']:.3f} |")
    text = "\n".join(lines) + "\n"
    write_text(RESULTS / "prompt_selection.md", text)
    print(text)


def answers_of_the_base(num_prompts: int = 1536, num_samples: int = 32):
    """Prompts, whether each answer is right (num_prompts, num_samples), and the tokenizer's encoding of a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.evaluation.sampling import sample_completions

    torch.set_num_threads(1)
    data = arithmetic_dataset("train", num_prompts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE_MODEL), AutoTokenizer.from_pretrained(BASE_MODEL)
    samples = sample_completions(model, tokenizer, data["prompt"], num_samples=num_samples, max_new_tokens=56)
    _, correct = grade_boxes(samples.completions, data["solution"])
    return data["prompt"], correct, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def simulate(
    prompts,
    outcomes: np.ndarray,
    encode,
    seed: int,
    *,
    candidates: int = 8,
    learn: bool = True,
    text: bool = True,
    own: bool = True,
    screening: bool = False,
) -> tuple[np.ndarray, float]:
    """Shares of completions in mixed groups, by generation, and mean seconds of a choice."""
    # With screening most groups end after their first half, so twice as many prompts have to be at hand.
    num_prompts = 2 * NUM_PROMPTS if screening else NUM_PROMPTS
    chooser = PromptSelection(
        prompts, encode, num_prompts=num_prompts, candidates=candidates, exploration=0.1, seed=seed
    )
    if not text:
        chooser._predict = lambda prompts: np.full(len(prompts), outcomes.mean())
    rng, budget = np.random.default_rng(seed), NUM_PROMPTS * NUM_GENERATIONS
    shares, seconds = [], 0.0
    for _ in range(GENERATIONS):
        start = time.process_time()
        rows = [row for row, _ in chooser.choose(NUM_GENERATIONS)]
        seconds += time.process_time() - start
        chosen = [chooser.number_of(prompts[row]) for row in rows]
        a, b = (
            chooser.posterior(chosen)
            if chooser.groups
            else np.full((2, num_prompts), prompt_selection.PRIOR_COUNT / 2)
        )
        asked, rewards, teaching, spent = [], [], 0, 0
        for place, prompt in enumerate(chosen):
            if spent >= budget:
                break
            answers = rng.choice(outcomes[chooser.first_rows[prompt]], NUM_GENERATIONS, replace=False)
            if screening and not goes_on(answers[: NUM_GENERATIONS // 2], a[place], b[place]):
                answers = answers[: NUM_GENERATIONS // 2]
            spent += len(answers)
            teaching += len(answers) * (0 < answers.mean() < 1)
            asked.append(prompt)
            rewards.append(np.pad(answers.astype(float), (0, NUM_GENERATIONS - len(answers)), constant_values=np.nan))
        rewards = np.array(rewards)
        if learn:
            chooser.update(asked, rewards, np.nanmin(rewards, axis=1) < np.nanmax(rewards, axis=1))
        else:
            chooser.generation += 1
        if not own:
            chooser._counts.clear()
        shares.append(teaching / spent)
    return np.array(shares), seconds / GENERATIONS


def goes_on(half: np.ndarray, a: float, b: float) -> bool:
    """Whether a group whose first half is known is worth its second half."""
    right, size = half.sum(), len(half)
    if 0 < right < size:
        return True
    # All alike so far: the group will be mixed unless the rest is like them, too.
    like, other = (a + size, b) if right else (b + size, a)
    steps = np.arange(NUM_GENERATIONS - size)
    return bool(((like + steps) / (like + other + steps)).prod() < 0.5)


if __name__ == "__main__":
    main()
