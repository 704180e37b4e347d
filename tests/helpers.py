"""What several test modules share: tiny models, datasets and trainers, rewards that give mixed groups, oracles."""

import inspect
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


if TYPE_CHECKING:
    from trl import GRPOTrainer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKEN = "hf_" + 20 * "x"  # looks like a secret of the Hub

TOKENS = {"<pad>": 0, "<eos>": 1, **{char: 2 + i for i, char in enumerate("0123456789+-*=;")}}
VOCABULARY = len(TOKENS)
# Sizes of a config that go with the tokenizer; the range is wide enough that completions differ in confidence.
TINY = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.5,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)


def tiny_qwen2(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    """A random model that writes digits and stops early."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**TINY, "num_hidden_layers": 2, "tie_word_embeddings": True, **overrides}))


def save_tiny_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Saves a `tiny_qwen2` with its tokenizer of characters, and returns the folder."""
    tokenizer = Tokenizer(models.WordLevel(TOKENS, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tiny_qwen2(seed).to(dtype).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def conversations(texts: Iterable[str], **columns) -> Dataset:
    """Prompts of one message of the user each; more columns by name."""
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts], **columns})


def prompt_dataset(num_prompts: int = 32, **columns) -> Dataset:
    """Conversational prompts of different lengths; more columns by name."""
    return conversations(["7+2="[: 2 + i % 3] + str(i) for i in range(num_prompts)], **columns)


def parity_reward(completion_ids, **kwargs) -> list[float]:
    """1 if the token ids add up to an even number: random, reproducible, and mixed in most groups."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def length_reward(completion_ids, **kwargs) -> list[float]:
    """A reward in [0, 1] that grows with the length."""
    return [min(len(ids), 10) / 10 for ids in completion_ids]


def first_token_is_even(completion_ids, **kwargs) -> list[float]:
    """A reward that a test sets by the first token of each completion."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def one_over_length(completion_ids, **kwargs) -> list[float]:
    return [1.0 / len(ids) for ids in completion_ids]


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


def tiny_trainer(
    trainer_class, model, folder, reward=parity_reward, dataset=None, config_class=None, **options
) -> "GRPOTrainer":
    """A trainer on `prompt_dataset()`. Options that its constructor takes go there, the others into its config."""
    from trl import GRPOConfig, GRPOTrainer

    names = set(options) & set(inspect.signature(GRPOTrainer.__init__).parameters)
    arguments = {name: options.pop(name) for name in names}
    config_class = config_class or getattr(trainer_class, "config_class", GRPOConfig)
    config = config_class(**config_kwargs(folder, **options))
    return trainer_class(model, reward, config, prompt_dataset() if dataset is None else dataset, **arguments)


def recipe_options(model, folder, **overrides) -> dict:
    """Options of `trl-capo train` on the arithmetic world, with a reward that gives a tiny model mixed groups."""
    options = {"model_name_or_path": str(model), "dataset_name": "arithmetic"}
    options |= {"reward_funcs": ["tests.helpers.parity_reward"]}
    return options | config_kwargs(folder, **overrides)


def parameters(trainer) -> dict[str, torch.Tensor]:
    """A copy of the policy's parameters, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Over all parameters; NaN where one is, which no bound holds for."""
    return torch.stack([(after[name] - before[name]).abs().max() for name in before]).max().item()


def logged(trainer, name: str) -> list[float]:
    """What a run logged under a name, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def count_forwards(model) -> list[int]:
    """A list that grows by one entry with each forward of the model from now on."""
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    return calls


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


def literal_advantages_of_groups(rewards, mean_logps, tau: float = 0.6) -> np.ndarray:
    """`literal_capo_advantages` of each row of (P, G) rewards and scores, tensors or arrays."""
    groups = zip(rewards.tolist(), mean_logps.tolist(), strict=True)
    return np.array([literal_capo_advantages(labels, scores, tau) for labels, scores in groups])


def unpadded_rows(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion token ids of each row of a trainer's batch, without padding."""
    rows = []
    for prompt, prompt_mask, completion, completion_mask in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        rows.append((prompt[prompt_mask.bool()].tolist(), completion[completion_mask.bool()].tolist()))
    return rows


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not os.path.isdir("/proc")
