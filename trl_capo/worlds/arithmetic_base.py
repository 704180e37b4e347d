"""The base models of the arithmetic world, trained from scratch.

They are trained in two supervised stages, on prompts that reinforcement learning and evaluation never see: first on
clean answers, so that the model knows sums and half knows products; then on human-like answers with slips and free
separators (see `trl_capo.data.arithmetic`). The flat base is what the first stage leaves, flattened. The base with
misconceptions continues from the shipped flat base, sharp again, and is flattened afterwards.
"""

import functools
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, set_seed

from trl_capo.calibration.metrics import accuracy, auc_pooled, auc_within, group_fractions
from trl_capo.data.arithmetic import (
    FLAT_MODEL,
    FLAT_SHARPNESS,
    MISCONCEPTION_SHARPNESS,
    SPLITS,
    arithmetic_dataset,
    arithmetic_tokenizer,
    sample_chains,
    write_answer,
)
from trl_capo.evaluation.grade import grade_samples
from trl_capo.evaluation.sampling import sample_completions


MAX_COMPLETION_LENGTH = 64  # the written-out steps of five numbers take at most 50 tokens
MICRO_BATCHES = 4

HUMAN_STEPS = {"slips": 400, "flat": 0, "misconceptions": 300}  # steps of the second stage, by world
SHARPNESS = {"slips": 1.0, "flat": FLAT_SHARPNESS, "misconceptions": MISCONCEPTION_SHARPNESS}


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of 0.86 M parameters in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def make_batch(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Tokenise (prompt, answer) pairs. The loss covers the answer and the end token."""
    rows = [tokenizer(chain + answer + tokenizer.eos_token)["input_ids"] for chain, answer in pairs]
    length = max(map(len, rows))
    # Pad on the right: without an attention mask, positions must start at the prompt's first token.
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    prompt_lengths = torch.tensor([[len(chain)] for chain, _ in pairs])
    is_answer = (torch.arange(length) >= prompt_lengths) & (input_ids != tokenizer.pad_token_id)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_answer, -100)}


def supervised_batches(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, batch_size: int, write: Callable[[str], str]
) -> Iterator[list[dict[str, Tensor]]]:
    """Endless batches of prompts from the base split with answers, cut into micro-batches of similar length."""
    chains = sample_chains("base", rng)
    while True:
        pairs = [(chain, write(chain)) for chain in islice(chains, batch_size)]
        # Chains of two numbers are a third as long as those of five. Padding them together would waste half the work.
        pairs.sort(key=lambda pair: len(pair[0] + pair[1]))
        size = -(-batch_size // MICRO_BATCHES)
        yield [make_batch(tokenizer, pairs[start : start + size]) for start in range(0, batch_size, size)]


def train(
    model: Qwen2ForCausalLM,
    batches: Iterator[list[dict[str, Tensor]]],
    steps: int,
    learning_rate: float,
    description: str,
) -> None:
    """One supervised stage: AdamW, short warm-up, cosine decay to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - 50), learning_rate / 10)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [50])
    model.train()
    for _ in (progress := tqdm(range(steps), desc=description)):
        batch = next(batches)
        num_tokens = sum((micro_batch["labels"] != -100).sum() for micro_batch in batch)
        loss = 0.0
        for micro_batch in batch:
            micro_loss = model(**micro_batch, num_items_in_batch=num_tokens).loss
            micro_loss.backward()
            loss += micro_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)


def report(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, split: str, num_prompts: int) -> str:
    """One line on a split: how often the model is right, and how well its confidence ranks the answers."""
    dataset = arithmetic_dataset(split, num_prompts)
    samples = sample_completions(
        model,
        tokenizer,
        list(dataset["prompt"]),
        max_new_tokens=MAX_COMPLETION_LENGTH,
        batch_size=1024,
        progress=False,
    )
    _, correct = grade_samples(samples, dataset["solution"], progress=False)
    return (
        f"{split:<12} accuracy {accuracy(correct):.3f}"
        f"   AUC within prompts {auc_within(correct, samples.mean_logps):.3f}"
        f"   pooled {auc_pooled(correct, samples.mean_logps):.3f}"
        f"   mixed prompts {group_fractions(correct)['frac_mixed']:.2f}"
    )


def build(
    output_dir: Path,
    *,
    world: str,
    clean_steps: int,
    human_steps: int | None,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Train a base model and save it with its tokenizer. The result depends only on the arguments.

    Args:
        output_dir: Folder for the model.
        world: A key of `HUMAN_STEPS`.
        clean_steps: Steps on clean answers; not used for misconceptions, which start from the shipped flat base.
        human_steps: Steps on human-like answers; None takes those of the shipped base. The flat base has none.
        batch_size: Answers per step.
        learning_rate: Peak learning rate of the first stage; the second uses a quarter of it.
        seed: Seed of the weights and the text.
    """
    set_seed(seed)
    tokenizer = arithmetic_tokenizer()
    human_steps = HUMAN_STEPS[world] if human_steps is None or world == "flat" else human_steps
    if world == "misconceptions":
        model = Qwen2ForCausalLM.from_pretrained(FLAT_MODEL)
        model.model.norm.weight.data /= FLAT_SHARPNESS
        rng = random.Random(seed + 1)  # other chains than those of the first stage
    else:
        model, rng = make_model(tokenizer), random.Random(seed)
        train(model, supervised_batches(tokenizer, rng, batch_size, write_answer), clean_steps, learning_rate, "clean")
    write = functools.partial(write_answer, rng=rng, misconceptions=world == "misconceptions")
    batches = supervised_batches(tokenizer, rng, batch_size, write)
    train(model, batches, human_steps, learning_rate / 4, "human-like")
    model.model.norm.weight.data *= SHARPNESS[world]  # the head is linear in it, so this flattens the logits
    # Make `generate` and TRL sample from the model's own distribution by default.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model, tokenizer


def reports(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, num_prompts: int) -> Iterator[str]:
    """`report` for each held-out split."""
    return (report(model, tokenizer, split, num_prompts) for split in SPLITS if split not in ("base", "train"))
