"""Does CAPO do what it claims? Runs every method of the study on the arithmetic world, with several seeds.

    python benchmarks/arithmetic_study.py --world slips --methods grpo capo --seeds 0 1 2 3 4
    python benchmarks/arithmetic_study.py --world slips --tune        # the runs from which the settings were chosen

A run trains one method from one base with one seed and, at regular checkpoints, samples held-out prompts 16 times.
Each finished run leaves `<world>/<method>-<seed>.json` (numbers) and `.npz` (outcomes of every prompt) in
`benchmarks/results/arithmetic_study/` and is not repeated. Rerun the same command to resume. To share the work between
machines, use `--shard 0/2` and `--shard 1/2`. No run starts if it would end after `--minutes`.

`python benchmarks/arithmetic_evidence.py` makes the tables and figures of `docs/evidence.md` from these files.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm


RESULTS = Path(__file__).parent / "results" / "arithmetic_study"
LONGEST_RUN = 400  # seconds that a run is assumed to take, until a longer one is recorded
NUM_SAMPLES = 16
# Sampling temperatures, besides 1, at the end of training; log-probs are always those at 1. The base is only sampled
# colder, because training makes it colder too.
TEMPERATURES = (0.7, 1.3)
BASE_TEMPERATURES = (0.3, 0.5, 0.7)
TEST_SPLITS = {"test_2": 500, "test_3": 500, "test_4": 500}  # prompts per split
TUNING_SPLITS = {"validation_2": 300, "validation_3": 300, "validation_4": 300}


@dataclass(frozen=True)
class World:
    """Where a run starts, how long it takes, and the settings that were chosen for it.

    Attributes:
        base: The base model, a key of `base_path`.
        sharpness: Factor on the base's logits; 1 leaves them unchanged.
        learning_rate: Learning rate of every method.
        tau: CAPO's tau, in nats.
        steps: Number of optimizer steps.
        checkpoints: Steps between evaluations of the methods in `MAIN`; the others are evaluated only at the end.
        schedule: Learning rate schedule.
        curve_prompts: Prompts per split, the first, for earlier checkpoints and for other temperatures.
        options: Changes to the shared options.
    """

    base: str = "slips"
    sharpness: float = 1.0
    learning_rate: float = 2e-4
    tau: float = 0.15
    steps: int = 120
    checkpoints: int = 30
    schedule: str = "linear"
    curve_prompts: int = 250
    options: dict = field(default_factory=dict)


MISCONCEPTIONS = World(
    "misconceptions",
    learning_rate=1e-4,
    tau=0.4,
    steps=240,
    checkpoints=24,
    schedule="constant",
    curve_prompts=100,
    options=dict(generation="compact", mean_logps_from="sampler"),
)
WORLDS = {
    "slips": World(),
    "flat": World("flat", tau=0.4),
    # A constant learning rate, as in the paper, and a longer run: does entropy explode?
    "slips_constant": World(learning_rate=1e-4, schedule="constant", steps=200, checkpoints=40),
    # Only to map where CAPO helps: the first base as flat as the second, the second as sharp as before flattening.
    "slips_flat": World("slips", 0.5, tau=0.4),
    "clean": World("flat", 2.0),
    # Where GRPO falls below its base. Learning is followed further, at a constant rate, by the faster trainer.
    "misconceptions": MISCONCEPTIONS,
    # Only its settings were tried, on the logits that we shipped first.
    "misconceptions_flatter": replace(MISCONCEPTIONS, sharpness=0.6 / 0.7, tau=0.4, steps=320, checkpoints=32),
}

MASK = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.05, 0.95])
# The paper calls its thresholds 1.05 and 2.5 quartiles. In the log-normal distribution of log-perplexity through them,
# 1.25 and 2.1, the paper's second pair, are the quantiles .51 and .72.
PAPER_MASK = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.25, 0.75])
PAPER_MASK_2 = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.51, 0.72])
NO_MASK = dict(ref_ppl_mask=False)
NO_STD, STD = dict(scale_rewards="none"), dict(scale_rewards="group")
CAPO = dict(pair_normalization="group")
# GSPO has four mini-batches per generation: the same number of generations, four times the steps.
GSPO = STD | dict(per_device_train_batch_size=64, max_steps=480)


def methods(world: str) -> dict[str, tuple[str, dict]]:
    """The methods of the study: each one's method in `trl-capo train`, and its changes to the shared options."""
    tau = WORLDS[world].tau
    if world.startswith("misconceptions"):
        capo = CAPO | NO_MASK | dict(tau=tau)
        return {
            "grpo": ("grpo", STD),
            "capo": ("capo", capo),
            "capo_falling": ("capo", capo | dict(tau=0.45, tau_end=0.2)),
            "cde": ("cde", STD),
            "gspo": ("gspo", GSPO | dict(epsilon=3e-3, epsilon_high=4e-3, max_steps=960)),
        }
    capo = CAPO | MASK | dict(tau=tau)
    return {
        "grpo": ("grpo", STD),
        "capo": ("capo", capo),
        "capo_no_mask": ("capo", capo | dict(ref_ppl_mask=False)),
        "grpo_mask": ("grpo", STD | MASK),
        "grpo_paper_mask": ("grpo", STD | PAPER_MASK),
        "grpo_no_std": ("grpo", NO_STD),
        "capo_tau_low": ("capo", capo | dict(tau=tau / 2)),
        "capo_tau_high": ("capo", capo | dict(tau=tau * 2)),
        "capo_paper_mask": ("capo", capo | PAPER_MASK),
        "capo_paper_mask_2": ("capo", capo | PAPER_MASK_2),
        "capo_gap": ("capo", capo | dict(tau_unit="gap", tau=2.0)),
        "capo_sum": ("capo", capo | dict(pair_normalization="sum")),
        "capo_batch": ("capo", capo | dict(pair_scope="batch", pair_normalization="sum")),
        "capo_ema": ("capo", capo | dict(sync_ref_model=True, ref_model_sync_steps=4, ref_model_mixup_alpha=0.1)),
        "grpo_graded": ("grpo", STD),
        "capo_graded": ("capo", capo | dict(graded_rewards=True)),
    }


# Methods with whole learning curves, and single samples at the end.
MAIN = ("base", "grpo", "capo", "capo_no_mask", "grpo_mask")

# Settings tried on the validation split with other seeds: before the study or, for the rivals, before the comparison.
TUNING = {
    "slips": {
        "grpo": ("grpo", NO_STD),
        "grpo lr 1e-4": ("grpo", NO_STD | dict(learning_rate=1e-4)),
        "grpo lr 4e-4": ("grpo", NO_STD | dict(learning_rate=4e-4)),
        "grpo std": ("grpo", STD),
        "grpo std lr 1e-4": ("grpo", STD | dict(learning_rate=1e-4)),
        "grpo std lr 4e-4": ("grpo", STD | dict(learning_rate=4e-4)),
        "capo": ("capo", CAPO | MASK | dict(tau=0.15)),
        "capo std": ("capo", CAPO | MASK | dict(tau=0.15, pair_normalization="std")),
        "capo lr 1e-4": ("capo", CAPO | MASK | dict(tau=0.15, learning_rate=1e-4)),
        "capo lr 4e-4": ("capo", CAPO | MASK | dict(tau=0.15, learning_rate=4e-4)),
        "capo tau 0.1": ("capo", CAPO | MASK | dict(tau=0.1)),
        "capo tau 0.25": ("capo", CAPO | MASK | dict(tau=0.25)),
        "capo mask 25-75": ("capo", CAPO | PAPER_MASK | dict(tau=0.15)),
        "gspo": ("gspo", GSPO),
        "gspo lr 5e-5": ("gspo", GSPO | dict(learning_rate=5e-5)),
        "gspo lr 1e-4": ("gspo", GSPO | dict(learning_rate=1e-4)),
        "gspo lr 4e-4": ("gspo", GSPO | dict(learning_rate=4e-4)),
        "gspo clip x10": ("gspo", GSPO | dict(epsilon=3e-3, epsilon_high=4e-3)),
        "gspo clip x10 lr 1e-4": ("gspo", GSPO | dict(epsilon=3e-3, epsilon_high=4e-3, learning_rate=1e-4)),
        "codapo": ("codapo", STD),
        "codapo lr 5e-5": ("codapo", STD | dict(learning_rate=5e-5)),
        "codapo lr 1e-4": ("codapo", STD | dict(learning_rate=1e-4)),
        "codapo lr 4e-4": ("codapo", STD | dict(learning_rate=4e-4)),
        "codapo no replay": ("codapo", STD | dict(replay=False)),
        "codapo median": ("codapo", STD | dict(replay_quantile=0.5)),
        "codapo w0 0.5": ("codapo", STD | dict(base_weight=0.5)),
        "cde": ("cde", STD),
        "cde lr 5e-5": ("cde", STD | dict(learning_rate=5e-5)),
        "cde lr 1e-4": ("cde", STD | dict(learning_rate=1e-4)),
        "cde lr 4e-4": ("cde", STD | dict(learning_rate=4e-4)),
        "cde omega 0.5": ("cde", STD | dict(bonus_weight=0.5)),
        "cde omega 2": ("cde", STD | dict(bonus_weight=2.0)),
        "cde constant": ("cde", STD | dict(bonus_weight_end=1.0)),
        "simko": ("simko", STD),
        "simko lr 1e-4": ("simko", STD | dict(learning_rate=1e-4)),
        "simko lr 4e-4": ("simko", STD | dict(learning_rate=4e-4)),
        "simko mix 0.1": ("simko", STD | dict(simko_mix=0.1)),
        "simko median": ("simko", STD | dict(simko_quantile=0.5)),
        "simko penalty 1.5": ("simko", STD | dict(simko_penalty=1.5)),
    },
    "misconceptions": {
        "grpo": ("grpo", NO_STD),
        "grpo std": ("grpo", STD),
        "grpo std lr 2e-4": ("grpo", STD | dict(learning_rate=2e-4)),
        "capo tau 0.2": ("capo", CAPO | NO_MASK | dict(tau=0.2)),
        "capo tau 0.3": ("capo", CAPO | NO_MASK | dict(tau=0.3)),
        "capo tau 0.4": ("capo", CAPO | NO_MASK | dict(tau=0.4)),
        "capo std tau 0.3": ("capo", NO_MASK | dict(pair_normalization="std", tau=0.3)),
        "capo tau 0.45 to 0.2": ("capo", CAPO | NO_MASK | dict(tau=0.45, tau_end=0.2)),
    },
    "misconceptions_flatter": {
        "grpo": ("grpo", NO_STD),
        "grpo std": ("grpo", STD),
        "grpo std lr 2e-4": ("grpo", STD | dict(learning_rate=2e-4)),
        "capo tau 0.25": ("capo", CAPO | NO_MASK | dict(tau=0.25)),
        "capo tau 0.4": ("capo", CAPO | NO_MASK | dict(tau=0.4)),
        "capo tau 0.6": ("capo", CAPO | NO_MASK | dict(tau=0.6)),
        "capo tau 0.6 to 0.3": ("capo", CAPO | NO_MASK | dict(tau=0.6, tau_end=0.3)),
        "capo tau 0.25 lr 2e-4": ("capo", CAPO | NO_MASK | dict(tau=0.25, learning_rate=2e-4)),
        "capo tau 0.4 lr 2e-4": ("capo", CAPO | NO_MASK | dict(tau=0.4, learning_rate=2e-4)),
        "capo tau 0.6 to 0.2": ("capo", CAPO | NO_MASK | dict(tau=0.6, tau_end=0.2)),
    },
}


def main_methods(world: str) -> tuple[str, ...]:
    """Methods whose learning curves and single samples are kept."""
    return ("base", *methods(world)) if world.startswith("misconceptions") else MAIN


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", choices=WORLDS, required=True, help="base and settings")
    parser.add_argument(
        "--tune", action="store_true", help="run the grid on the validation split instead of the study"
    )
    parser.add_argument("--methods", nargs="+", help="methods to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (default: 0 to 4; to tune, 10 and 11)")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n equal parts (default: all)")
    parser.add_argument("--minutes", type=float, default=90, help="start no run that would end later (default: 90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parallel runs (default: one per core)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per run, because this model is too small to use more
    if args.tune and args.world not in TUNING:
        raise SystemExit(f"--tune: world {args.world!r} has no tuning grid; its settings come from another world.")
    names = args.methods or list(TUNING[args.world] if args.tune else ["base", *methods(args.world)])
    seeds = args.seeds or ([10, 11] if args.tune else range(5))
    part, parts = map(int, args.shard.split("/"))
    # Share by seed: if stopped early, all methods have equally many runs, and compared runs used the same machine.
    seeds = [seed for index, seed in enumerate(seeds) if index % parts == part]
    wanted = [(args.world, method, seed, args.tune) for seed in seeds for method in names]
    jobs = [job for job in wanted if not is_done(*job)]
    deadline = time.time() + 60 * args.minutes
    failures = []
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *job, deadline): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), desc=args.world, unit="run"):
            if future.exception():
                failures.append(f"{futures[future]}: {future.exception()!r}")
    done = sum(result_path(*job).exists() for job in wanted)
    print(f"{done} of {len(wanted)} runs are done.", *failures, sep="\n")
    if failures:
        raise SystemExit(1)


def result_path(world: str, method: str, seed: int, tune: bool) -> Path:
    if tune:
        world += "_tuning"
    elif method == "base":  # worlds with the same base share its evaluation
        start = (WORLDS[world].base, WORLDS[world].sharpness)
        world = next(name for name, other in WORLDS.items() if (other.base, other.sharpness) == start)
    return RESULTS / world / f"{method.replace(' ', '_')}-{seed}.json"


def is_done(world: str, method: str, seed: int, tune: bool) -> bool:
    """Whether the run is finished. A run with other options could be mistaken for it, so that is an error."""
    path = result_path(world, method, seed, tune)
    if not path.exists():
        return False
    recorded = json.loads(path.read_text())["options"]  # the first runs recorded only their own options
    wanted = {} if method == "base" else options_of(world, method, seed, tune)
    if recorded != {name: wanted.get(name) for name in recorded}:
        raise SystemExit(f"{path} was run with other options than {method!r} has now. Delete it to run it again.")
    return True


def options_of(world: str, method: str, seed: int, tune: bool) -> dict:
    """Options of a run: those of `trl-capo demo`, then the world's changes, then the method's."""
    from trl_capo.compare import demo

    options = demo.SHARED | demo.OWN["grpo"]
    options |= dict(
        max_steps=WORLDS[world].steps,
        seed=seed,
        learning_rate=WORLDS[world].learning_rate,
        lr_scheduler_type=WORLDS[world].schedule,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=20,
    )
    return options | WORLDS[world].options | (TUNING[world] if tune else methods(world))[method][1]


def run(world: str, method: str, seed: int, tune: bool, deadline: float) -> bool:
    """Train, evaluate at every checkpoint, and save. Returns False if there is not enough time left."""
    import torch
    from quiet import be_quiet

    from trl_capo.files import replacing, write_text

    started, path = time.time(), result_path(world, method, seed, tune)
    longest = max([json.loads(p.read_text())["seconds"] for p in path.parent.glob("*.json")] + [LONGEST_RUN])
    if started + longest > deadline:
        return False
    be_quiet()
    torch.set_num_threads(1)
    evaluations, history = _evaluate_base(world, seed) if method == "base" else _train(world, method, seed, tune)
    summary = {
        "world": world,
        "method": method,
        "seed": seed,
        "base": asdict(WORLDS[world]),
        "options": {} if method == "base" else options_of(world, method, seed, tune),
        "checkpoints": {step: evaluation[0] for step, evaluation in evaluations.items()},
        "training": history,
        "seconds": round(time.time() - started),
        "date": str(date.today()),
        "machine": f"{platform.machine()} CPU, one thread of {os.cpu_count()}",
        "versions": {name: version(name) for name in ("torch", "trl", "transformers")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if not tune:
        arrays = {step: arrays for step, (_, arrays) in evaluations.items()}
        with replacing(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **_compact(method in main_methods(world), arrays))
    write_text(path, json.dumps(summary, indent=1))  # last, because it marks the run as complete
    return True


def _compact(singles: bool, arrays: dict[int | str, dict]) -> dict[str, np.ndarray]:
    """What the evidence needs: prompts at every checkpoint; single samples, if wanted, only at the end."""
    compact = {}
    last = max(step for step in arrays if isinstance(step, int))
    for step, by_name in arrays.items():
        for name, array in by_name.items():
            kind = name.split("/")[1]
            if kind in ("right", "auc") or (step == last and singles):
                compact[f"{step}/{name}"] = array
    return compact


def _evaluate_base(world: str, seed: int) -> tuple[dict, list]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_base(world, folder)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    evaluations = {0: evaluate(model, tokenizer, TEST_SPLITS, seed)}
    return evaluations | at_temperatures(world, model, tokenizer, BASE_TEMPERATURES, seed), []


def at_temperatures(
    world: str, model, tokenizer, temperatures: tuple[float, ...], seed: int
) -> dict[str, tuple[dict, dict]]:
    """Evaluate samples at other temperatures, on the prompts of the learning curves."""
    splits = dict.fromkeys(TEST_SPLITS, WORLDS[world].curve_prompts)
    return {f"T{t}": evaluate(model, tokenizer, splits, seed, t) for t in temperatures}


def _train(world: str, method: str, seed: int, tune: bool) -> tuple[dict, list]:
    from transformers import PrinterCallback, TrainerCallback

    from trl_capo.data.arithmetic import arithmetic_dataset
    from trl_capo.methods import trainer_of

    kind, _ = (TUNING[world] if tune else methods(world))[method]
    trainer_class = trainer_of(kind)
    options, evaluations = options_of(world, method, seed, tune), {}
    last = options["max_steps"]
    every = last
    if method in main_methods(world) and not tune:
        every = WORLDS[world].checkpoints * last // WORLDS[world].steps  # GSPO takes several steps per generation
    splits = TUNING_SPLITS if tune else TEST_SPLITS
    curve_splits = dict.fromkeys(splits, WORLDS[world].curve_prompts)

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model, processing_class, **kwargs):
            if state.global_step % every == 0:
                at = splits if state.global_step == last else curve_splits
                evaluations[state.global_step] = evaluate(model, processing_class, at, seed)

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_base(world, base)
        trainer = trainer_class(
            str(base),
            step_credit if method.endswith("graded") else box_reward,
            trainer_class.config_class(folder, **options),
            arithmetic_dataset("train"),
            callbacks=[Evaluate()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if method in main_methods(world) and not tune:
        evaluations |= at_temperatures(world, trainer.model, trainer.processing_class, TEMPERATURES, seed)
    return evaluations, [entry for entry in trainer.state.log_history if "capo/auc_within" in entry]


def write_base(world: str, folder: str | Path) -> None:
    """Save the base of a world, with its logits multiplied by the world's sharpness."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = base_path(WORLDS[world].base)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.norm.weight.data *= WORLDS[world].sharpness  # the head is linear in it
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)


def base_path(base: str) -> Path:
    from trl_capo.data.arithmetic import BASE_MODEL, FLAT_MODEL, MISCONCEPTIONS_MODEL

    return {"slips": BASE_MODEL, "flat": FLAT_MODEL, "misconceptions": MISCONCEPTIONS_MODEL}[base]


def box_reward(completions, solution, **kwargs) -> list[float]:
    """TRL's `accuracy_reward`, faster: see `grade_boxes`."""
    _, correct = grade_boxes([[completion[0]["content"]] for completion in completions], solution)
    return correct[:, 0].tolist()


def step_credit(completions, prompts, solution, **kwargs) -> list[float]:
    """Graded reward: 1 for the right answer, otherwise 0.4 times the share of the chain's steps that are right."""
    from trl_capo.data.arithmetic import evaluate_step, split_chain

    rewards = box_reward(completions, solution)
    for i, (completion, prompt) in enumerate(zip(completions, prompts, strict=True)):
        if rewards[i] == 1:
            continue
        value, steps = split_chain(prompt[-1]["content"])
        results = []
        for operator, right in steps:
            value = evaluate_step(value, operator, right)
            results.append(str(value))
        written = re.findall(r"=(\d+)", completion[0]["content"])
        rewards[i] = 0.4 * sum(a == b for a, b in zip(results, written, strict=False)) / len(results)
    return rewards


def evaluate(model, tokenizer, splits: dict[str, int], seed: int, temperature: float = 1.0) -> tuple[dict, dict]:
    """Sample held-out prompts 16 times. Returns numbers by split, and each prompt's outcomes as compact arrays."""
    from trl_capo.calibration.metrics import auc_by_prompt
    from trl_capo.evaluation.sampling import sample_completions
    from trl_capo.evaluation.summary import summarize

    numbers, arrays = {}, {}
    for split, num_prompts in splits.items():
        data = held_out(split, num_prompts)
        samples = sample_completions(
            model,
            tokenizer,
            data["prompt"],
            num_samples=NUM_SAMPLES,
            max_new_tokens=56,
            temperature=temperature,
            seed=seed,
            progress=False,
        )
        answers, correct = grade_boxes(samples.completions, data["solution"])
        numbers[split] = summarize(correct, samples.mean_logps, answers) | {
            # Mean surprisal of the sampled tokens: at temperature 1 its expectation is the mean token entropy.
            "entropy": -(samples.mean_logps * samples.lengths).sum() / samples.lengths.sum(),
            "length": samples.lengths.mean(),
        }
        arrays[f"{split}/right"] = correct.sum(axis=1).astype(np.uint8)
        arrays[f"{split}/correct"] = np.packbits(correct.astype(bool), axis=1)
        arrays[f"{split}/mean_logps"] = samples.mean_logps.astype(np.float32)
        arrays[f"{split}/auc"] = auc_by_prompt(correct, samples.mean_logps).astype(np.float32)
        arrays[f"{split}/answers"] = np.array([_numbered(row) for row in answers], dtype=np.int8)
    return numbers, arrays


def held_out(split: str, num_prompts: int):
    """A test split, or `validation_N`: the chains of N numbers in the validation split."""
    from trl_capo.data.arithmetic import arithmetic_dataset, split_chain

    if split.startswith("test"):
        return arithmetic_dataset(split, num_prompts)
    data = arithmetic_dataset("validation", 1600)
    lengths = [1 + len(split_chain(prompt[0]["content"])[1]) for prompt in data["prompt"]]
    return data.select([i for i, length in enumerate(lengths) if split.endswith(str(length))][:num_prompts])


def grade_boxes(completions: list[list[str]], solutions: list[str]) -> tuple[list[list[str | None]], np.ndarray]:
    r"""Like `grade_samples`, but several times faster: compares a single `\boxed{digits}` as a number.

    Leaves everything else, such as no box or several, to math-verify.
    """
    from trl_capo.evaluation.grade import grade

    answers = [[None] * len(row) for row in completions]
    correct = np.zeros((len(completions), len(completions[0])))
    for p, (row, solution) in enumerate(zip(completions, solutions, strict=True)):
        for n, text in enumerate(row):
            boxes = re.findall(r"\\boxed\{([^}]*)\}", text)
            if len(boxes) == 1 and text.count(r"\boxed{") == 1 and boxes[0].isdecimal():
                answers[p][n] = str(int(boxes[0]))
                correct[p, n] = answers[p][n] == solution.removeprefix(r"\boxed{").removesuffix("}")
            else:
                grades = grade([text], [solution], progress=False)
                answers[p][n], correct[p, n] = grades.answers[0], grades.correct[0]
    return answers, correct


def _numbered(answers: list[str | None]) -> list[int]:
    """Answers to one prompt, numbered in order of appearance; -1 where nothing was extracted."""
    order = list(dict.fromkeys(answer for answer in answers if answer is not None))
    return [-1 if answer is None else order.index(answer) for answer in answers]


if __name__ == "__main__":
    main()
