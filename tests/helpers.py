"""What several test modules share: a tiny model, a dataset, a reward that gives mixed groups, and literal oracles."""

import math
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tiny_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Saves a random model that writes digits and stops early, and returns its folder."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{char: 2 + i for i, char in enumerate("0123456789+-*=;")}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # wide enough that completions differ in confidence
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def prompt_dataset(num_prompts: int = 32, **columns) -> Dataset:
    """Conversational prompts of different lengths; more columns by name."""
    questions = ["7+2="[: 2 + i % 3] + str(i) for i in range(num_prompts)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions], **columns})


def parity_reward(completion_ids, **kwargs) -> list[float]:
    """1 if the token ids add up to an even number: random, reproducible, and mixed in most groups."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def length_reward(completion_ids, **kwargs) -> list[float]:
    """A reward in [0, 1] that grows with the length."""
    return [min(len(ids), 10) / 10 for ids in completion_ids]


def config_kwargs(output_dir, **overrides) -> dict:
    """Arguments of a run that is exact (float32, no checkpointing of activations) and small."""
    kwargs = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    return {**kwargs, **overrides}


def literal_mean_logp(model, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """Mean log-prob of a completion from an unpadded forward of this one sequence."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(ids).logits[0].double().log_softmax(dim=-1)
    start = len(prompt_ids)
    return sum(logps[start + t - 1, token].item() for t, token in enumerate(completion_ids)) / len(completion_ids)


def first_batch(trainer) -> dict:
    """The first micro-batch of a training, with its advantages; nothing is learnt."""
    batches, stop = [], StopIteration("recorded")

    def record(model, inputs, **kwargs):
        batches.append(inputs)
        raise stop

    trainer.compute_loss, original = record, trainer.compute_loss
    try:
        trainer.train()
    except StopIteration as raised:
        assert raised is stop
    trainer.compute_loss = original
    return batches[0]


def literal_logits(model, batch: dict) -> list[torch.Tensor]:
    """Logits at the tokens of each completion, (T, V), from forwards of single sequences without padding."""
    rows = []
    for prompt, completion in unpadded_rows(batch):
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
        rows.append(logits[len(prompt) - 1 : -1])
    return rows


def move(model, distance: float) -> None:
    """Moves all parameters at random, so that the policy is no longer the one that sampled."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += distance * torch.randn(parameter.shape, generator=generator)


def literal_capo_advantages(rewards: list[float], mean_logps: list[float], tau: float) -> list[float]:
    """CAPO's advantages of one group, by the double loop of the definition; NaN takes part in nothing."""
    advantages = []
    for reward_i, score_i in zip(rewards, mean_logps, strict=True):
        total = 0.0
        for reward_j, score_j in zip(rewards, mean_logps, strict=True):
            if not any(math.isnan(x) for x in (reward_i, score_i, reward_j, score_j)):
                gap = reward_i - reward_j
                total += gap / (1.0 + math.exp((score_i - score_j) * gap / tau))
        advantages.append(total)
    return advantages


def unpadded_rows(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion token ids of each row of a trainer's batch, without padding."""
    rows = []
    for prompt, prompt_mask, completion, completion_mask in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        rows.append((prompt[prompt_mask.bool()].tolist(), completion[completion_mask.bool()].tolist()))
    return rows
