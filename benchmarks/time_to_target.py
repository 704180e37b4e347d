"""How long until a model is as good as TRL's GRPO ends up? Seconds and generated tokens, on the demo's world.

    python benchmarks/time_to_target.py --minutes 180                    # all variants, five seeds, one core
    python benchmarks/time_to_target.py --report                         # results/time_to_target.md, .json and .png
    python benchmarks/time_to_target.py --device cuda --minutes 25       # the same on a GPU, in another folder
    python benchmarks/time_to_target.py --device cuda --report

All variants share base, prompts, reward, options and seeds; only the trainer differs:

    grpo_stock     TRL's GRPOTrainer
    grpo_fast      GRPO of this package: the fast step
    grpo_compact   the same, and finished rows leave the batch during generation
    grpo_all       the same, and prompts are chosen that are likely to have right and wrong completions; completions
                   are scored by the log-probs that they were sampled with
    capo_uniform   CAPO as in the demo (no mask, so no reference), with compact generation and these scores
    capo_all       the same, with chosen prompts

Of chosen prompts 20 make a generation, of uniform ones 32: about as many of their completions have an advantage.

CAPO gains accuracy more slowly than GRPO, so its runs are a quarter longer. Final numbers are those after equal
steps.

The target is the validation accuracy of TRL's GRPO at the end of its run, mean over seeds. Evaluations are noisy, so
every accuracy here is the mean of an evaluation and the two before it, placed at the last of the three. A variant
reaches the target where its mean curve over the seeds first does, on the line between two evaluations; TRL's GRPO is
timed by the same rule. Intervals come from resampling the seeds, the same ones for a variant and for TRL's GRPO.

The clock runs while the trainer trains. It stands still during imports, loading and evaluations. Each moment counts
for one part of a step: generation, rewards, passes (log-probs without gradient), loss (forward and backward),
optimizer, and the rest. On CUDA the device is synchronised where one part gives way to another.

For each seed, all variants run in turn, each in a fresh process, and the next seed begins with another variant. The
committed results were made by two such commands at a time, each on a core of its own (`taskset`). A finished run
leaves `<variant>-<seed>.json` and is not repeated: rerun the same command to resume.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

from arithmetic_study import box_reward, grade_boxes
from tqdm import tqdm

from trl_capo.calibration import metrics
from trl_capo.compare import demo
from trl_capo.files import write_json


RESULTS = Path(__file__).parent / "results"
COMPACT, SCORED = dict(generation="compact"), dict(mean_logps_from="sampler")
CHOSEN = dict(prompt_selection="informative", per_device_train_batch_size=160)
VARIANTS = {
    "grpo_stock": ("trl", demo.OWN["grpo"]),
    "grpo_fast": ("grpo", demo.OWN["grpo"]),
    "grpo_compact": ("grpo", demo.OWN["grpo"] | COMPACT),
    "grpo_all": ("grpo", demo.OWN["grpo"] | COMPACT | SCORED | CHOSEN),
    "capo_uniform": ("capo", demo.OWN["capo"] | COMPACT | SCORED),
    "capo_all": ("capo", demo.OWN["capo"] | COMPACT | SCORED | CHOSEN),
}
STOCK = "grpo_stock"
LONGER = {"capo_uniform": 1.25, "capo_all": 1.25}  # times the steps of the others, for CAPO gains accuracy more slowly
UNIFORM = {"grpo_all": "grpo_compact", "capo_all": "capo_uniform"}  # what differs only in the choice of prompts
PARTS = ("generation", "rewards", "passes", "loss", "optimizer", "rest")
CURVE = ("validation", 300, 8)  # split, prompts, samples of each
FINAL = [("test_2", 300, 16), ("test_3", 300, 16), ("test_4", 300, 16)]
EVALUATION_SEED = 0
LONGEST_RUN = 600  # seconds; until a longer one was seen


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="training seeds")
    parser.add_argument(
        "--steps", type=int, default=120, help="optimizer steps, after which the final numbers are taken"
    )
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="on cpu one thread; float32 on both")
    parser.add_argument("--minutes", type=float, default=180, help="start no run that would end later")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: results/time_to_target[_cuda])")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figure of the finished runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder = args.output or RESULTS / ("time_to_target" if args.device == "cpu" else "time_to_target_cuda")
    if args.report:
        from time_to_target_report import report

        return report(folder)
    deadline = time.time() + 60 * args.minutes
    jobs = []
    for number, seed in enumerate(args.seeds):
        first = number % len(args.variants)
        jobs += [(variant, seed) for variant in args.variants[first:] + args.variants[:first]]
    wanted = [(folder / f"{variant}-{seed}.json", variant, options_of(args, variant, seed)) for variant, seed in jobs]
    schedule = {"steps": args.steps, "every": args.every}
    for path, variant, options in tqdm(wanted, desc="Time to target", unit="run"):
        if is_done(path, options, schedule):
            continue
        longest = max([json.loads(p.read_text())["run_seconds"] for p in folder.glob("*.json")], default=LONGEST_RUN)
        if time.time() + longest > deadline:
            break
        # A process each: no run profits from what another has imported, compiled or cached.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(run, path, variant, options, schedule).result()
    print(f"{sum(path.exists() for path, *_ in wanted)} of {len(wanted)} runs are done, in {folder}.")


def options_of(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Options of a run: the demo's and the variant's own."""
    steps = round(args.steps * LONGER.get(variant, 1))
    run_options = dict(max_steps=steps, seed=seed, use_cpu=args.device == "cpu", save_strategy="no", disable_tqdm=True)
    return demo.SHARED | VARIANTS[variant][1] | run_options


def is_done(path: Path, options: dict, schedule: dict[str, int]) -> bool:
    """Whether the run exists; one with other options would be mistaken for it, so that is an error."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    if (found["options"], found["schedule"]) != (options, schedule):
        raise SystemExit(f"{path} was made with other options: delete it to run it again, or choose another --output.")
    return True


def run(path: Path, variant: str, options: dict, schedule: dict[str, int]) -> None:
    """Train one variant with one seed, evaluate it on the way, save.

    Args:
        schedule: `every`, the steps between evaluations, and `steps`, after which the test splits are answered.
    """
    import torch
    from quiet import be_quiet
    from step_cost import cpu_name
    from transformers import PrinterCallback

    from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
    from trl_capo.publish.record import git_state

    be_quiet()
    started, load = time.time(), os.getloadavg()[0]
    if options["use_cpu"]:
        torch.set_num_threads(1)
        hardware, clock = f"{cpu_name()}, one thread of {os.cpu_count()}", Clock()
    else:
        hardware, clock = torch.cuda.get_device_name(), Clock(torch.cuda.synchronize)
    counts, curve, final = Counter(), [], {}
    trainer_class, config_class = trainer_and_config(VARIANTS[variant][0])
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            str(BASE_MODEL), box_reward, config_class(output_dir, **options), arithmetic_dataset("train")
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watcher(clock, counts, curve, final, schedule))
        watch(trainer, clock, counts)
        trainer.train()
    summary = {
        "variant": variant,
        "seed": options["seed"],
        "options": options,
        "schedule": schedule,
        "curve": curve,
        "parts": {part: clock.seconds[part] for part in PARTS},
        "final": final,
        "run_seconds": round(time.time() - started),
        "date": date.today().isoformat(),
        "hardware": hardware,
        "load": {"before": load, "after": os.getloadavg()[0]},
        "package": git_state(Path(__file__).parent, tracked=Path(__file__).name),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-capo")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, summary)


def trainer_and_config(method: str) -> tuple[type, type]:
    from trl import GRPOConfig, GRPOTrainer

    from trl_capo.methods import trainer_of

    return (GRPOTrainer, GRPOConfig) if method == "trl" else (trainer_of(method), trainer_of(method).config_class)


class Clock:
    """Seconds by part. Parts lie within parts, and time counts for the innermost; "stopped" is no part of a step.

    Example:
        >>> clock = Clock()
        >>> clock.enter("loss"), clock.enter("generation"), clock.leave(), clock.leave()
        (None, None, None, None)
        >>> list(clock.seconds), clock.training() == sum(clock.seconds.values())
        (['stopped', 'loss', 'generation'], False)
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = defaultdict(float)
        self.parts = ["stopped"]
        self.since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._charge()
        self.parts.append(part)

    def leave(self) -> None:
        self._charge()
        self.parts.pop()

    def training(self) -> float:
        """Seconds until now, in all parts."""
        self._charge()
        return sum(seconds for part, seconds in self.seconds.items() if part != "stopped")

    def _charge(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, method: Callable, unless: Callable[[], bool] = lambda: False) -> Callable:
        def wrapped(*args, **kwargs):
            if unless():
                return method(*args, **kwargs)
            self.enter(part)
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()

        return wrapped


def watch(trainer, clock: Clock, counts: Counter) -> None:
    """Times and counts what passes through TRL's own methods, the same for its trainer and for ours."""
    import torch

    generate, score = trainer._generate, trainer._generate_and_score_completions

    def counted(prompts):
        generated = generate(prompts)
        counts["tokens"] += sum(map(len, generated[1]))
        return generated

    def counted_scores(inputs):
        output = score(inputs)
        counts["completions"] += len(output["advantages"])
        counts["with_advantage"] += int((output["advantages"] != 0).sum())
        return output

    trainer._generate = clock.timed("generation", counted)
    trainer._generate_and_score_completions = counted_scores
    trainer._calculate_rewards = clock.timed("rewards", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = clock.timed(
        "passes", trainer._get_per_token_logps_and_entropies, unless=torch.is_grad_enabled
    )
    trainer.training_step = clock.timed("loss", trainer.training_step)
    trainer._prepare_inputs = clock.timed("rest", trainer._prepare_inputs)  # within the training step


def watcher(clock: Clock, counts: Counter, curve: list[dict], final: dict, schedule: dict[str, int]):
    """The callback that starts the clock, times the optimizer, and evaluates with the clock stopped."""
    from transformers import TrainerCallback

    def record(state, model, tokenizer) -> None:
        point = {"step": state.global_step, "seconds": clock.training()}
        point |= {name: counts[name] for name in ("tokens", "completions", "with_advantage")}
        clock.enter("stopped")
        curve.append(point | evaluate(model, tokenizer, *CURVE))
        if state.global_step == schedule["steps"]:
            final.update({split: evaluate(model, tokenizer, split, *numbers) for split, *numbers in FINAL})
        clock.leave()

    class Watcher(TrainerCallback):
        def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
            record(state, model, processing_class)
            clock.enter("rest")

        def on_train_end(self, args, state, control, **kwargs):
            clock.leave()

        def on_step_end(self, args, state, control, model, processing_class, **kwargs):
            if state.global_step % schedule["every"] == 0 or state.global_step in (state.max_steps, schedule["steps"]):
                record(state, model, processing_class)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            clock.enter("optimizer")

        def on_optimizer_step(self, args, state, control, **kwargs):
            clock.leave()

    return Watcher()


def evaluate(model, tokenizer, split: str, num_prompts: int, num_samples: int) -> dict[str, float]:
    from trl_capo.data.arithmetic import arithmetic_dataset
    from trl_capo.evaluation.sampling import sample_completions

    data = arithmetic_dataset(split, num_prompts)
    samples = sample_completions(
        model,
        tokenizer,
        data["prompt"],
        num_samples=num_samples,
        max_new_tokens=demo.SHARED["max_completion_length"],
        seed=EVALUATION_SEED,
        progress=False,
    )
    _, correct = grade_boxes(samples.completions, data["solution"])
    auc = metrics.auc_within(correct, samples.mean_logps)
    return {"accuracy": float(metrics.accuracy(correct)), "auc_within": float(auc)}


if __name__ == "__main__":
    main()
