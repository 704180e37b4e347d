"""`trl-capo train --dry-run`: show what a recipe would do, without a GPU, before you pay for anything.

The dataset is loaded and prepared as for training. Only the model's configuration and tokenizer are read, no weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments

from trl_capo.errors import UserError
from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.source import explained, model_path
from trl_capo.planning.memory import GIB, KNOWN_OPTIMIZERS, Memory, memory
from trl_capo.preflight.prompts import check_lengths_fit, check_prompts_fit, vocabulary_of


if TYPE_CHECKING:
    from trl_capo.trainer.scoring import GroupScoringTrainer


def make_parser() -> argparse.ArgumentParser:
    """Parser for options that exist only in a dry run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print what the run would do, then stop")
    parser.add_argument(
        "--accelerate_config", help="dry run: accelerate's configuration file, for processes and sharding"
    )
    parser.add_argument(
        "--gpu_memory", type=float, default=80.0, help="dry run: memory of each GPU in GiB (default: %(default)s)"
    )
    return parser


def take_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split off the options of a dry run. A recipe for GPUs can then also be read on a machine without one."""
    options, rest = make_parser().parse_known_args(argv)
    return options, rest if torch.cuda.is_available() else [*rest, "--use_cpu", "true"]


def read_launch(path: str | None) -> tuple[int, str]:
    """Number of processes and sharding in an accelerate configuration. Without one, there is one process.

    Raises:
        UserError: The file describes an unsupported launch.
    """
    import yaml

    if path is None:
        return 1, "none"
    with open(path, encoding="utf-8") as file:
        launch = yaml.safe_load(file)
    kind, processes = launch.get("distributed_type"), int(launch.get("num_processes", 1))
    if kind == "DEEPSPEED":
        stage = launch["deepspeed_config"]["zero_stage"]
        if stage in (2, 3):
            return processes, f"zero{stage}"
    elif kind == "FSDP":
        return processes, "fsdp2"
    elif kind in ("MULTI_GPU", "MULTI_CPU"):
        return processes, "ddp"
    elif kind == "NO":
        return 1, "none"
    raise UserError(f"{path}: a dry run does not know distributed_type {kind!r}, only DDP, FSDP2, ZeRO-2 and ZeRO-3.")


def empty_model(path: str, dtype: str | None, args, revision: str | None = None):
    """A causal language model without storage, built from its configuration, in float32 unless a dtype is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code)
    precision = config.dtype if dtype == "auto" else getattr(torch, dtype or "float32")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=precision, trust_remote_code=args.trust_remote_code)


@contextmanager
def as_if_launched(num_processes: int) -> Iterator[None]:
    """Configurations created inside this context see `num_processes` as the world size, for checks and defaults."""
    original = TrainingArguments.world_size
    TrainingArguments.world_size = property(lambda self: num_processes)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TrainingArguments.world_size = original  # type: ignore[method-assign]


def batch_lines(
    method_class: type[GroupScoringTrainer], args, num_processes: int, num_prompts: int, num_eval_prompts: int
) -> list[str]:
    """The batch arithmetic in prompts and completions, and steps in both units."""
    from trl_capo.preflight.checks import steps_between_generations
    from trl_capo.preflight.schedule import schedule

    rows = args.per_device_train_batch_size * num_processes
    generation, update = rows * args.steps_per_generation, rows * args.gradient_accumulation_steps
    interval = steps_between_generations(args)
    draws = method_class.generations_per_batch(args)
    run = schedule(args, num_prompts, draws)
    prompts, steps, batches = run.prompts_per_generation, run.steps, run.rollout_batches
    used = num_prompts // prompts * prompts
    lines = [
        f"A generation: {num_processes} processes x {args.per_device_train_batch_size} rows x "
        f"{args.steps_per_generation} = {generation:,} completions, {args.num_generations} for each of {prompts:,} "
        "prompts.",
        f"An optimizer step: {num_processes} x {args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} = {update:,} completions; generations begin every {interval} "
        f"step{'s' if interval > 1 else ''}.",
        f"Training: {steps:,} optimizer steps = {batches:,} rollout batches = {run.prompts_seen:,} prompts"
        f"{f', each batch drawn {draws} times,' if draws > 1 else ''} = {run.prompts_seen / used:.2f} epochs of "
        f"{used:,}.",
    ]
    if used < num_prompts:
        lines.append(
            f"Each epoch leaves out {num_prompts - used:,} of the {num_prompts:,} prompts, which do not fill a "
            "generation. With shuffle_dataset, these are different prompts each time."
        )
    if num_eval_prompts and args.eval_strategy != "no":
        times = steps // int(args.eval_steps) if args.eval_strategy == "steps" and args.eval_steps >= 1 else 1
        rows = args.per_device_eval_batch_size * num_processes
        num_generations = args.num_generations_eval or args.num_generations
        parts = math.ceil(num_eval_prompts * num_generations / rows)
        lines.append(
            f"Evaluation: {num_eval_prompts:,} prompts x {num_generations} = {parts:,} batches, {times} "
            f"times. A batch waits for its longest answer: {parts * times:,} such waits, and {batches:,.0f} in "
            "training."
        )
    return lines


def estimate(
    method_class: type[GroupScoringTrainer],
    args,
    model_args,
    path: str,
    launch: tuple[int, str],
    gpu_bytes: int,
    tokens: int,
):
    """Memory per GPU, and the policy without storage that it was computed from."""
    from trl import get_peft_config

    num_processes, sharding = launch
    model, reference = empty_model(path, model_args.dtype, args, model_args.model_revision), None
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    elif args.ref_ppl_mask or method_class.needs_ref(args) or args.beta != 0:
        source = model_path(args.ref_model_name_or_path) if args.ref_model_name_or_path else path
        reference = empty_model(source, args.ref_model_dtype or model_args.dtype, args)
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    found = memory(
        model,
        optim=str(getattr(args.optim, "value", args.optim)),
        reference=reference,
        sharding=sharding,
        num_processes=num_processes,
        deepspeed_bf16=args.bf16,
        rows=args.per_device_train_batch_size,
        tokens=tokens,
        compute_bytes=2 if args.bf16 or args.fp16 else next(model.parameters()).element_size(),
        gradient_checkpointing=args.gradient_checkpointing,
        unfused_head=method_class._reads_logits,
        vllm=round(args.vllm_gpu_memory_utilization * gpu_bytes) if colocated else 0,
    )
    return found, model


def describe(
    method_class: type[GroupScoringTrainer],
    options: argparse.Namespace,
    args,
    model_args,
    path: str,
    train_dataset,
    eval_dataset,
    max_prompt_tokens: int | None,
) -> list[str]:
    """Describe the planned training, in lines.

    Args:
        method_class: The trainer class.
        options: Options from `make_parser`.
        args: The trainer's configuration.
        model_args: TRL's `ModelConfig`.
        path: Path of the model.
        train_dataset: Prepared training rows.
        eval_dataset: Evaluation rows, or None.
        max_prompt_tokens: Longest prompt, in tokens. None means the longest prompt in the dataset.
    """
    from transformers import AutoConfig, AutoTokenizer

    from trl_capo.models.prompts import tokenize

    launch = read_launch(options.accelerate_config)
    with explained(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.model_revision)
        config = AutoConfig.from_pretrained(
            path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    rows = dict(train_dataset=train_dataset, eval_dataset=eval_dataset)
    check_prompts_fit(tokenizer, vocabulary_of(config), args.chat_template_kwargs, **rows)
    check_lengths_fit(tokenizer, config, args, **rows)
    if max_prompt_tokens is None:
        as_asked = with_defaults(tokenizer, args.chat_template_kwargs)
        max_prompt_tokens = max(map(len, tokenize(as_asked, list(train_dataset["prompt"]))))
    tokens = max_prompt_tokens + args.max_completion_length
    gpu_bytes = round(options.gpu_memory * GIB)
    found, model = estimate(method_class, args, model_args, path, launch, gpu_bytes, tokens)
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    validation = "none" if eval_dataset is None else f"{len(eval_dataset):,}"
    lines = [
        f"Method: {method_class._name}. Model: {path}, {numbers:,} parameters, {trained:,} of them trained.",
        f"Prompts: {len(train_dataset):,} to train on, {validation} to evaluate on, each with at most "
        f"{max_prompt_tokens:,} tokens.",
        f"First prompt: {train_dataset[0]['prompt']}, gold {train_dataset[0].get('solution')!r}",
        *batch_lines(method_class, args, launch[0], len(train_dataset), len(eval_dataset or ())),
        *memory_lines(found, launch, gpu_bytes),
    ]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for limit, name in ((context, "the model's context"), (args.vllm_max_model_length, "vllm_max_model_length")):
        if limit is not None and tokens > limit:
            lines.append(f"⚠️ {tokens:,} tokens of prompt and completion exceed {name}, {limit:,}.")
    if str(getattr(args.optim, "value", args.optim)) not in KNOWN_OPTIMIZERS:
        lines.append(f"⚠️ The state of the optimizer {args.optim} is unknown and counted as AdamW's.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        lines.append("⚠️ Quantised weights are counted unquantised.")
    return lines + end_of_turn_warning(path, tokenizer, model_args.model_revision)


def end_of_turn_warning(path: str, tokenizer, revision: str | None) -> list[str]:
    """Warn if nothing stops at the model's end-of-turn token: then every answer has the maximum length."""
    from transformers import GenerationConfig

    if tokenizer.chat_template is None:
        return []
    turn = tokenizer.apply_chat_template([{"role": "assistant", "content": "7"}], tokenize=False)
    ends = [token for token in tokenizer.all_special_tokens if token in turn.rpartition("7")[2]]
    try:
        stops = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except OSError:
        stops = None
    stops = {tokenizer.eos_token_id, *([stops] if isinstance(stops, int) else stops or [])}
    unknown = [token for token in ends if tokenizer.convert_tokens_to_ids(token) not in stops]
    if not ends or len(unknown) < len(ends):
        return []
    return [
        f"⚠️ The chat template ends a turn with {unknown[0]}, at which generation does not stop. Train one step first "
        "(--max_steps 1): if completions/clipped_ratio is near 1, add its id to eos_token_id in the model's "
        "generation_config.json."
    ]


def memory_lines(found: Memory, launch: tuple[int, str], gpu_bytes: int) -> list[str]:
    """GiB per GPU by purpose, and whether the total fits."""
    num_processes, sharding = launch
    kind = "one process" if num_processes == 1 else f"{num_processes} processes, {sharding}"
    share = found.total / gpu_bytes
    lines = [
        f"Memory per GPU in GiB ({kind}; activations are an estimate):",
        *(f"  {name:12}{size / GIB:9.3f}" for name, size in vars(found).items() if size),
        f"  {'total':12}{found.total / GIB:9.3f}   {share:.0%} of {gpu_bytes / GIB:g} (--gpu_memory)",
    ]
    if share > 0.95:
        lines.append(
            "⚠️ This will probably not fit. Use fewer rows (per_device_train_batch_size), more sharding "
            "(--accelerate_config), LoRA (use_peft), or a smaller vllm_gpu_memory_utilization."
        )
    return lines
