"""What the trainer's part of a step costs: TRL's GRPO, a naive CAPO, both through the seam, and a hand-written floor.

    python benchmarks/step_cost.py --generate
    python benchmarks/step_cost.py --sigma 0 --degenerate 0 --name step_cost_no_waste
    python benchmarks/step_cost.py --sweep --repeats 2 --mean_length 32 --max_length 140 --name step_cost_sweep
    python benchmarks/step_cost.py --device cuda --shape 1.5B --prompts 128 --mean_length 700 --max_length 2048

All variants train on the same completions, drawn beforehand, in one process. Each repeat draws new ones and starts
with another variant. Ratios are taken within a repeat and reported as median and range. Each phase is timed where its
work happens: forwards without gradient by hooks on the two models, the loss as a micro-step minus the preparation of
its inputs, the optimizer by callbacks. On CUDA the device is synchronised at each boundary. Generation and rewards are
left out, because they are the same for all variants.

    grpo_stock   TRL's GRPOTrainer
    capo_naive   CAPO on top of it: policy and reference pass over every row, padded as TRL pads (repack=False)
    grpo_ours    GRPO through the seam
    capo_ours    CAPOTrainer
    floor        CAPO in a plain PyTorch loop over the required rows only, packed without padding

The mask's thresholds are so wide that CAPO pays for its reference but drops nothing.
"""

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import date
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from quiet import be_quiet
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.methods.advantages import pairwise_logistic_advantages
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.generation import decode_compactly, generating_by


RESULTS = Path(__file__).parent / "results"
VARIANTS = ("grpo_stock", "capo_naive", "grpo_ours", "capo_ours", "floor")
PHASES = ("old", "reference", "loss", "optimizer")
TAU = 0.6
# The shapes of Qwen2.5, and one that a CPU trains in seconds.
SHAPES = {
    "10M": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, heads=(6, 2), vocab_size=2048),
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, heads=(14, 2), vocab_size=151936),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, heads=(12, 2), vocab_size=151936),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device: bf16 on cuda, float32 on cpu"
    )
    parser.add_argument("--shape", default="10M", choices=list(SHAPES), help="model size, with random weights")
    parser.add_argument(
        "--lora", action="store_true", help="train a LoRA adapter; the model without it is the reference"
    )
    parser.add_argument("--prompts", type=int, default=16, help="prompts per generation")
    parser.add_argument("--num_generations", type=int, default=8, help="completions per prompt")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows in TRL's micro-batches")
    parser.add_argument("--mean_length", type=int, default=64, help="mean completion length, lognormal")
    parser.add_argument("--sigma", type=float, default=0.7, help="standard deviation of the log lengths")
    parser.add_argument("--max_length", type=int, default=280, help="longer completions are cut")
    parser.add_argument("--degenerate", type=float, default=0.5, help="share of all-right and all-wrong groups")
    parser.add_argument("--layouts", nargs="+", default=["S=G", "S=2G"], choices=["S=G", "S=2G"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--generations", type=int, default=1, help="generations per run")
    parser.add_argument("--repeats", type=int, default=4, help="runs per variant, each with other completions")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--generate", action="store_true", help="also time generation once, TRL's and the compact one")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="vary batch, length, group size, sigma and degenerate share instead, with S=2G",
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--name", default="step_cost", help="write results/NAME.json, .md and .png")
    return parser


@dataclass
class Rollouts:
    """Completions of several generations, drawn once. Each has P * G rows; the G rows of a prompt are adjacent."""

    prompts: list[str]  # (num_generations_of_the_run * P,)
    completions: list[list[list[int]]]
    rewards: dict[tuple[int, ...], float]


def draw_rollouts(args: argparse.Namespace, vocab_size: int, seed: int) -> Rollouts:
    # One generator each, so that changing one does not change the others.
    text, labels, lengths = (np.random.default_rng([seed, stream]) for stream in range(3))
    prompts, generations, rewards = [], [], {}
    for _ in range(args.generations):
        rows = []
        for p in range(args.prompts):
            prompts.append(" ".join(f"t{token}" for token in text.integers(2, vocab_size, lengths.integers(12, 25))))
            if p < round(args.degenerate * args.prompts):
                correct = np.full(args.num_generations, labels.integers(2))
            else:
                correct = labels.permutation(
                    np.arange(args.num_generations) < labels.integers(1, args.num_generations)
                )
            drift = np.log(args.mean_length) - args.sigma**2 / 2
            drawn = np.clip(lengths.lognormal(drift, args.sigma, args.num_generations), 2, args.max_length)
            for length, reward in zip(drawn.astype(int), correct, strict=True):
                rows.append([*text.integers(2, vocab_size, length - 1).tolist(), 1])
                rewards[tuple(rows[-1])] = float(reward)
        generations.append(rows)
    return Rollouts(prompts, generations, rewards)


def make_model(args: argparse.Namespace) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    shape = dict(SHAPES[args.shape])
    heads, kv_heads = shape.pop("heads")
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if args.device == "cuda" else torch.float32)
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, shape["vocab_size"])}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class NaiveCAPOTrainer(CAPOTrainer):
    """Sends every row through the policy and the reference, whether or not it can matter."""

    def _rows_needing_logps(self, groups):
        return groups.valid

    _rows_needing_ref = _rows_needing_logps


class Clock(TrainerCallback):
    """The seconds of each phase of one run, and the tokens that went through the models."""

    def __init__(self, device: str):
        self.seconds = defaultdict(float)
        self.tokens = defaultdict(int)
        self.device = device
        self.in_reference = False

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, model, phase_without_gradient: str) -> None:
        """Counts the model's tokens, and times its forwards without gradient."""

        def before(module, positional, kwargs):
            phase = "loss" if torch.is_grad_enabled() else self.pass_of(phase_without_gradient)
            mask = kwargs["attention_mask"]
            self.tokens[f"{phase}_padded"] += mask.numel()
            self.tokens[f"{phase}_real"] += int(mask.sum())
            self.tokens[f"{phase}_rows"] += len(mask)
            self.tokens[f"{phase}_squares"] += mask.shape[0] * mask.shape[1] ** 2
            if phase == "loss":
                self.tokens["largest_micro_batch"] = max(self.tokens["largest_micro_batch"], mask.numel())
            self.started = self.now()

        def after(module, positional, output):
            if not torch.is_grad_enabled():
                self.seconds[self.pass_of(phase_without_gradient)] += self.now() - self.started

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after)

    def pass_of(self, default: str) -> str:
        return "reference" if self.in_reference else default  # under LoRA the reference is the policy's model

    def watch_reference(self, trainer) -> None:
        original = trainer._ref_mean_logps

        def marked(*args):
            self.in_reference = True
            try:
                return original(*args)
            finally:
                self.in_reference = False

        trainer._ref_mean_logps = marked

    def wrap(self, trainer, method: str, key: str, but_not: tuple[str, ...] = ()) -> None:
        """Adds the time of a trainer's method to `key`, minus the time that the keys `but_not` gained meanwhile."""
        original = getattr(trainer, method)

        def timed(*args, **kwargs):
            others = sum(self.seconds[other] for other in but_not)
            start = self.now()
            result = original(*args, **kwargs)
            spent = self.now() - start
            self.seconds[key] += spent - (sum(self.seconds[other] for other in but_not) - others)
            return result

        setattr(trainer, method, timed)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.started = self.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seconds["optimizer"] += self.now() - self.started


def options(args: argparse.Namespace, layout: str, folder: str) -> dict:
    micro_steps = args.prompts * args.num_generations // args.micro_batch
    accumulation = micro_steps if layout == "S=G" else micro_steps // 2
    return dict(
        output_dir=folder,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=micro_steps,
        num_generations=args.num_generations,
        max_steps=args.generations * micro_steps // accumulation,
        max_completion_length=args.max_length,
        loss_type="grpo",
        optim="sgd",  # AdamW would turn rounding errors in tiny gradients into steps and hide a real error
        learning_rate=1.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=args.gradient_checkpointing,
        report_to="none",
        save_strategy="no",
        shuffle_dataset=False,
        disable_tqdm=True,
        seed=0,
    )


def build(args, variant: str, layout: str, folder: str, policy, tokenizer, rollouts: Rollouts, clock: Clock):
    common = options(args, layout, folder)
    capo = dict(ref_ppl_low=1.0, ref_ppl_high=1e9, scale_rewards="none")
    trainer_class, config = {
        "grpo_stock": lambda: (GRPOTrainer, GRPOConfig(scale_rewards="none", **common)),
        "grpo_ours": lambda: (GRPO, GroupAdvantageConfig(scale_rewards="none", **common)),
        "capo_naive": lambda: (NaiveCAPOTrainer, CAPOConfig(repack=False, **capo, **common)),
        "capo_ours": lambda: (CAPOTrainer, CAPOConfig(**capo, **common)),
    }[variant]()

    def accuracy(completion_ids, **kwargs):
        return [rollouts.rewards[tuple(ids)] for ids in completion_ids]

    peft_config = None
    if args.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    dataset = Dataset.from_dict({"prompt": rollouts.prompts})
    with redirect_stdout(StringIO()):
        trainer = trainer_class(
            policy,
            accuracy,
            config,
            dataset,
            processing_class=tokenizer,
            callbacks=[clock],
            **({"peft_config": peft_config} if peft_config else {}),
        )
    generations = itertools.cycle(rollouts.completions)
    trainer._generate_single_turn = lambda *positional, **kwargs: (next(generations), None)
    return trainer


def run_trainer(args, variant, layout, folder, policy, tokenizer, rollouts) -> tuple[Clock, dict]:
    clock = Clock(args.device)
    trainer = build(args, variant, layout, folder, policy, tokenizer, rollouts, clock)
    clock.watch(trainer.model, "old")
    if getattr(trainer, "ref_model", None) is not None:
        clock.watch(trainer.ref_model, "reference")
    if isinstance(trainer, GroupAdvantageTrainer):
        clock.watch_reference(trainer)
    for method in ("_build_groups", "_compute_advantages", "_replace_advantages", "_repack", "_calibration_metrics"):
        if isinstance(trainer, GroupAdvantageTrainer):
            clock.wrap(trainer, method, "bookkeeping", but_not=("old", "reference"))
    clock.wrap(trainer, "_prepare_inputs", "preparation")
    clock.wrap(trainer, "training_step", "loss", but_not=("preparation",))
    start = clock.now()
    with redirect_stdout(StringIO()):
        trainer.train()
    clock.seconds["step"] = clock.now() - start
    return clock, dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())


def run_floor(args, layout, policy, rollouts: Rollouts, tokenizer) -> tuple[Clock, dict]:
    """GRPO's clipped loss with CAPO's advantages; each backward pass has as many tokens as our micro-batches."""
    clock = Clock(args.device)
    policy = policy.to(args.device)
    reference = copy.deepcopy(policy).eval()
    policy.train()
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    micro_steps = args.prompts * args.num_generations // args.micro_batch
    updates = 1 if layout == "S=G" else 2
    start = clock.now()
    for g, completions in enumerate(rollouts.completions):
        prompts = rollouts.prompts[g * args.prompts : (g + 1) * args.prompts]
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(args.num_generations)]
        rows = list(zip(prompt_ids, completions, strict=True))
        rewards = torch.tensor([rollouts.rewards[tuple(c)] for c in completions]).view(-1, args.num_generations)
        mixed = (rewards.amax(dim=1) > rewards.amin(dim=1)).repeat_interleave(args.num_generations)
        needed = mixed.nonzero().squeeze(1).tolist()
        order = torch.randperm(len(rows)).tolist()
        windows = [order[i::updates] for i in range(updates)]
        # Our trainer's budget: the same number of micro-steps, with about equally many tokens in each.
        tokens = sum(len(p) + len(c) for p, c in (rows[i] for i in needed))
        budget = max(1, tokens // micro_steps)
        mean_logps, old = torch.zeros(len(rows)), {}
        for phase, model in (("old", policy), ("reference", reference)):
            began = clock.now()
            with torch.no_grad():
                for part in packs(rows, needed, 2 * budget):
                    for i, logps in zip(part, logps_of(model, [rows[i] for i in part]), strict=True):
                        if phase == "old":
                            old[i], mean_logps[i] = logps, logps.mean()
            clock.seconds[phase] += clock.now() - began
        advantages = pairwise_logistic_advantages(rewards, mean_logps.view_as(rewards), TAU).flatten()
        for window in windows:
            began = clock.now()
            kept = [i for i in window if mixed[i]]
            for part in packs(rows, kept, budget):
                loss = 0.0
                for i, logps in zip(part, logps_of(policy, [rows[i] for i in part]), strict=True):
                    ratio = (logps - old[i]).exp()
                    clipped = torch.min(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
                    loss = loss - clipped.mean() / len(window)
                loss.backward()
                clock.tokens["loss_padded"] += sum(len(rows[i][0]) + len(rows[i][1]) for i in part)
            clock.seconds["loss"] += clock.now() - began
            began = clock.now()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.seconds["optimizer"] += clock.now() - began
    clock.seconds["step"] = clock.now() - start
    return clock, dict(policy.state_dict())


def packs(rows, index: list[int], budget: int) -> Iterator[list[int]]:
    """Packs of at most `budget` tokens (or one row), longest rows first."""
    pack, size = [], 0
    for i in sorted(index, key=lambda i: -len(rows[i][0]) - len(rows[i][1])):
        length = len(rows[i][0]) + len(rows[i][1])
        if pack and size + length > budget:
            yield pack
            pack, size = [], 0
        pack.append(i)
        size += length
    if pack:
        yield pack


def logps_of(model, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Log-probs of each row's completion tokens, from one forward pass over the concatenated rows, unpadded."""
    ids = torch.tensor([token for prompt, completion in rows for token in prompt + completion], device=model.device)
    positions = torch.cat([torch.arange(len(prompt) + len(completion)) for prompt, completion in rows])
    # Where positions restart, transformers knows that a row ends, so attention stays within rows.
    outputs = model.model(ids[None], position_ids=positions[None].to(model.device), use_cache=False)
    hidden, end, logps = outputs.last_hidden_state[0], 0, []
    for prompt, completion in rows:
        start, end = end + len(prompt), end + len(prompt) + len(completion)
        logits = model.lm_head(hidden[start - 1 : end - 1]).float()
        logps.append(-torch.nn.functional.cross_entropy(logits, ids[start:end], reduction="none"))
    return logps


def forward_flops(config: Qwen2Config, tokens: int, squares: int) -> float:
    """One forward pass: 2 per weight and token, plus 4 x hidden x width per token and layer for (full) attention."""
    head_dim = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * (2 * config.hidden_size + 2 * config.num_key_value_heads * head_dim)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return 2.0 * weights * tokens + 4.0 * config.num_hidden_layers * config.hidden_size * squares


def total_flops(args, config: Qwen2Config, tokens: dict[str, int]) -> float:
    passes = {"old": 1, "reference": 1, "loss": 4 if args.gradient_checkpointing else 3}
    return sum(
        times * forward_flops(config, tokens[f"{phase}_padded"], tokens[f"{phase}_squares"])
        for phase, times in passes.items()
    )


def measure(args: argparse.Namespace, layout: str, model, tokenizer, bar: tqdm) -> dict:
    """All variants of one layout: seconds per generation, work, and how much their parameters differ."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    variants = [variant for variant in args.variants if not (variant == "floor" and args.lora)]
    runs = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(-1, args.repeats):
            warm_up = repeat < 0
            case = argparse.Namespace(**{**vars(args), "prompts": 4}) if warm_up else args
            rollouts = draw_rollouts(case, model.config.vocab_size, seed=max(repeat, 0))
            parameters = {}
            first = max(repeat, 0) % len(variants)
            for variant in variants[first:] + variants[:first]:
                policy = copy.deepcopy(model)
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                torch.manual_seed(0)
                if variant == "floor":
                    clock, parameters[variant] = run_floor(case, layout, policy, rollouts, tokenizer)
                else:
                    clock, parameters[variant] = run_trainer(
                        case, variant, layout, folder, policy, tokenizer, rollouts
                    )
                if warm_up:
                    continue
                runs[variant].append(row_of(case, model.config, clock, rollouts))
                bar.update()
            same = [("grpo_ours", "grpo_stock"), ("capo_ours", "capo_naive")]
            if layout == "S=G":  # with two updates, the floor assigns other rows to each
                same.append(("floor", "capo_ours"))
            for ours, theirs in same:
                if not warm_up and ours in parameters and theirs in parameters:
                    row = runs[ours][-1]
                    row["parameters_differ_by"] = largest(parameters[ours], parameters[theirs])
                    if not args.lora:
                        row["parameters_moved_by"] = largest(parameters[ours], start)
    return {variant: summarize(variant, rows, runs) for variant, rows in runs.items()}


def row_of(args, config: Qwen2Config, clock: Clock, rollouts: Rollouts) -> dict[str, float]:
    """One run: seconds and work per generation."""
    row = {phase: clock.seconds[phase] / args.generations for phase in PHASES}
    row["phases"] = sum(row.values())
    row["step"] = clock.seconds["step"] / args.generations
    row["bookkeeping"] = clock.seconds["bookkeeping"] / args.generations
    if clock.tokens["loss_rows"]:
        for kind in ("padded", "real"):
            tokens = sum(clock.tokens[f"{phase}_{kind}"] for phase in ("old", "reference", "loss"))
            row[f"{kind}_tokens"] = tokens / args.generations
        row["largest_micro_batch"] = clock.tokens["largest_micro_batch"]
        row["teraflops"] = total_flops(args, config, clock.tokens) / 1e12 / args.generations
        row["flops_over_floor"] = row["teraflops"] * 1e12 * args.generations / floor_flops(args, config, rollouts)
    if args.device == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def summarize(variant: str, rows: list[dict], runs: dict[str, list[dict]]) -> dict:
    """Medians over the repeats, and ratios with their range."""
    summary = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    if "parameters_differ_by" in summary:
        summary["parameters_differ_by"] = max(row["parameters_differ_by"] for row in rows)
    for baseline in ("grpo_stock", "floor"):
        if baseline not in runs or variant == baseline or (baseline == "floor" and not variant.startswith("capo")):
            continue
        for key in ("phases", "teraflops"):
            if key in rows[0] and key in runs[baseline][0]:
                ratios = [row[key] / other[key] for row, other in zip(rows, runs[baseline], strict=True)]
                summary[f"{key}_over_{baseline}"] = statistics.median(ratios)
                summary[f"{key}_over_{baseline}_range"] = [min(ratios), max(ratios)]
    return summary


def floor_flops(args, config: Qwen2Config, rollouts: Rollouts) -> float:
    """The FLOPs of CAPO without waste: policy, reference and loss on the unpadded rows of mixed groups."""
    passes = 2 + (4 if args.gradient_checkpointing else 3)
    total = 0.0
    for g, completions in enumerate(rollouts.completions):
        for i, completion in enumerate(completions):
            group = completions[i // args.num_generations * args.num_generations :][: args.num_generations]
            if len({rollouts.rewards[tuple(member)] for member in group}) > 1:
                prompt = rollouts.prompts[g * args.prompts + i // args.num_generations]
                length = len(prompt.split()) + len(completion)
                total += passes * forward_flops(config, length, length**2)
    return total


def largest(a: dict, b: dict) -> float:
    return max((a[name].float().cpu() - b[name].float().cpu()).abs().max().item() for name in a)


class EndAt(LogitsProcessor):
    """Lets as many rows end at each length as in a list, in whatever order, and no other."""

    def __init__(self, lengths: list[int], prompt_width: int):
        self.lengths, self.prompt_width = lengths, prompt_width

    def __call__(self, input_ids, scores):
        completions = input_ids[:, self.prompt_width :]
        running = (completions != 1).all(dim=1).nonzero()[:, 0]
        ending = running[: self.lengths.count(completions.shape[1] + 1)]
        scores[ending] = -torch.inf
        scores[:, 1] = -torch.inf
        scores[ending, 1] = 0.0
        return scores


def seconds_of_generation(args, model, tokenizer, context) -> float:
    """Generates one batch with transformers, with the lengths of the first rollouts, within a context."""
    rollouts = draw_rollouts(args, model.config.vocab_size, seed=0)
    prompts = [p for p in rollouts.prompts[: args.prompts] for _ in range(args.num_generations)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    lengths = [len(row) for row in rollouts.completions[0]]
    end = EndAt(lengths, inputs["input_ids"].shape[1])
    model = model.to(args.device).eval()
    start = time.perf_counter()
    with torch.no_grad(), context(model):
        model.generate(
            **inputs.to(args.device), do_sample=True, top_k=0, max_new_tokens=max(lengths), logits_processor=[end]
        )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sweep(args: argparse.Namespace, model, tokenizer) -> list[dict]:
    """Vary one setting at a time and keep the others; only stock and our trainers."""
    values = {
        "prompts": (8, 16, 32),
        "mean_length": (16, 32, 64),
        "num_generations": (4, 8, 16),
        "sigma": (0.0, 0.4, 0.7, 1.0),
        "degenerate": (0.0, 0.25, 0.5, 0.75),
    }
    cases = [(name, value) for name, choices in values.items() for value in choices]
    rows = []
    variants = ["grpo_stock", "grpo_ours", "capo_ours"]
    with tqdm(total=len(cases) * args.repeats * len(variants), desc="Sweep", unit="run") as bar:
        for name, value in cases:
            case = argparse.Namespace(**{**vars(args), name: value, "variants": variants})
            if name == "mean_length":
                case.max_length = round(args.max_length * value / args.mean_length)
            rows.append({"varied": name, "value": value, **measure(case, "S=2G", model, tokenizer, bar)})
    return rows


def to_markdown(results: dict) -> str:
    lines = [f"# What a step costs ({results['date']})", "", f"`{results['command']}`", "", results["hardware"], ""]
    if "generation_seconds" in results:
        seconds = results["generation_seconds"]
        lines += [
            f"Not in the times: generating the batch with transformers, {seconds['trl']:.1f} s as TRL does it, "
            f'{seconds["compact"]:.1f} s with `generation="compact"`.',
            "",
        ]
    for layout, rows in results["layouts"].items():
        columns = ["variant", *(f"{phase}, s" for phase in PHASES), "phases, s", "over stock", "over floor"]
        columns += ["padded tokens", "real", "largest micro-batch", "FLOPs over CAPO's floor", "seam's own"]
        columns += ["parameters differ"]
        lines += [f"## {layout}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for variant, row in rows.items():
            cells = [variant, *(f"{row[phase]:.2f}" for phase in PHASES), f"{row['phases']:.2f}"]
            cells += [ratio(row, "phases_over_grpo_stock"), ratio(row, "phases_over_floor")]
            cells += [show(row, key, ",.0f") for key in ("padded_tokens", "real_tokens", "largest_micro_batch")]
            cells += [show(row, "flops_over_floor", ".2f")]
            cells += [f"{row['bookkeeping'] / row['step']:.2%}" if row["bookkeeping"] else ""]
            cells += [show(row, "parameters_differ_by", ".0e")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        if any("peak_memory_gib" in row for row in rows.values()):
            peaks = ", ".join(f"{variant} {row['peak_memory_gib']:.2f}" for variant, row in rows.items())
            lines += [f"Peak memory, GiB: {peaks}.", ""]
    if results.get("sweep"):
        lines += ["## Sweep, S=2G: over TRL's GRPO", ""]
        lines += [
            "| varied | value | GRPO, time | GRPO, FLOPs | CAPO, time | CAPO, FLOPs |",
            "|---|---|---|---|---|---|",
        ]
        for row in results["sweep"]:
            cells = [row["varied"], str(row["value"])]
            for variant in ("grpo_ours", "capo_ours"):
                cells += [ratio(row[variant], f"{key}_over_grpo_stock") for key in ("phases", "teraflops")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def show(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def ratio(row: dict, key: str) -> str:
    if key not in row:
        return ""
    low, high = row[f"{key}_range"]
    return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["varied"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        cases = [row for row in rows if row["varied"] == name]
        values = [row["value"] for row in cases]
        for variant, label, color in (("grpo_ours", "GRPO, ours", "C0"), ("capo_ours", "CAPO, ours", "C1")):
            for key, style, what in (("phases", "-", "time"), ("teraflops", ":", "FLOPs")):
                ratios = [row[variant][f"{key}_over_grpo_stock"] for row in cases]
                axis.plot(values, ratios, style, color=color, marker=".", label=f"{label}, {what}")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xlabel(name)
        axis.set_ylim(0)
    axes[0].set_ylabel("over TRL's GRPO")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    args = make_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    results = {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "hardware": f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "layouts": {},
    }
    be_quiet()
    model, tokenizer = make_model(args)
    results["parameters"] = model.num_parameters()
    if args.sweep:
        results["sweep"] = sweep(args, model, tokenizer)
        args.layouts = []
    if args.generate:
        results["generation_seconds"] = {
            generation: seconds_of_generation(args, copy.deepcopy(model), tokenizer, context)
            for generation, context in (("trl", nullcontext), ("compact", partial(generating_by, decode_compactly)))
        }
    runs = len(args.layouts) * len(args.variants) * args.repeats
    with tqdm(total=runs, desc="Variants", unit="run") as bar:
        for layout in args.layouts:
            results["layouts"][layout] = measure(args, layout, model, tokenizer, bar)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1))
    (RESULTS / f"{args.name}.md").write_text(to_markdown(results))
    if args.sweep:
        plot(results["sweep"], RESULTS / f"{args.name}.png")
    print(to_markdown(results))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
