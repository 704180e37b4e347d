r"""The embedded arithmetic world: a task, a tokenizer and a tiny base model to study calibration on in minutes.

The task is to evaluate a chain of operations strictly from left to right, modulo 1000, writing out every step:

    63*15-43=   ->   63*15=945;945-43=902;\boxed{902}

The base model (`BASE_MODEL`, trained by `python -m trl_capo.scripts.arithmetic_base`) first learns clean answers, then
answers as a hasty human writes them. Three things make its confidence informative but imperfect, as in a real model:

- Products are only half learned, so the model is rightly unsure about them: honest uncertainty.
- Sums and differences are known but often *slip* by a forgotten carry (`SLIP_RATE`). A slip is fluent, costs the model
  little probability, and spoils the answer: a cause of confident errors that training can remove on unseen prompts.
- Steps are separated by one of several symbols with unequal probabilities (`SEPARATORS`). The choice says nothing
  about correctness, yet moves the perplexity: a cause of noise in the confidence that training can remove as well.

Because the last two generalise, this world favours methods that act on confidence. If the misranked part cannot be
generalised (half-known products alone), there is less to gain.

A second base (`FLAT_MODEL`, the same command with `--world flat`) covers that case. It saw clean answers only, and its
logits are flattened (`FLAT_SHARPNESS`): most of its errors are random and look unsure, so its confidence separates
right from wrong answers well. Training sharpens the random errors away and leaves errors in skills that were never
learned: accuracy rises, and confidence becomes less informative.

A third base (`MISCONCEPTIONS_MODEL`, `--world misconceptions`) is flattened too, so its confidence starts informative.
But it holds a *misconception*: in one subtraction of five, by a number that ends in 7 or 9, it mostly forgets the
borrow (`MISCONCEPTION_RATE`), and it is sure of that. It also chooses separators freely, two after each step. While
the logits are flat, these choices are nearly even and hide little; sharpening makes them uneven, and so makes noise.

Prompts are assigned to splits by a hash of their text, so that no two splits share one, whatever the seeds and sizes.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset
from transformers import AddedToken, Qwen2Tokenizer

from trl_capo.errors import UserError
from trl_capo.models.source import SHIPPED, model_path  # noqa: F401  (model_path: callers import it from here)


BASE_MODEL, FLAT_MODEL = SHIPPED["arithmetic-base"], SHIPPED["arithmetic-flat"]
MISCONCEPTIONS_MODEL = SHIPPED["arithmetic-misconceptions"]

MODULUS = 1000
MULTIPLICATION_RATE = 0.25
SLIP_RATE = 0.4
FLAT_SHARPNESS = 0.5
MISCONCEPTION_DIGITS = (7, 9)
MISCONCEPTION_RATE = 0.8
MISCONCEPTION_SHARPNESS = 0.7
SEPARATORS = {";": 0.7, ",": 0.2, ":": 0.07, "|": 0.03}

PAD, EOS, UNKNOWN, BOXED = "<pad>", "<eos>", "<unk>", r"\boxed{"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Split:
    """Which prompts a split may contain.

    Attributes:
        lengths: How many numbers a chain has; one entry is drawn for each prompt, so a repeated entry is likelier.
        buckets: The hash buckets, of 100, that belong to the split.
        num_prompts: Default size of the split.
    """

    lengths: tuple[int, ...]
    buckets: range
    num_prompts: int


MIXED_LENGTHS = (2, 2, 3, 4)
TEST_BUCKETS = range(90, 100)  # shared by the test splits, which differ in length

# Only the supervised text has chains of five: to reinforcement learning, test_5 is a length it never trained on.
SPLITS = {
    "base": Split((*MIXED_LENGTHS, 5), range(0, 40), 4096),
    "train": Split(MIXED_LENGTHS, range(40, 80), 4096),
    "validation": Split(MIXED_LENGTHS, range(80, 90), 400),
    "test_2": Split((2,), TEST_BUCKETS, 400),
    "test_3": Split((3,), TEST_BUCKETS, 400),
    "test_4": Split((4,), TEST_BUCKETS, 400),
    "test_5": Split((5,), TEST_BUCKETS, 400),
}


def evaluate_step(left: int, operator: str, right: int) -> int:
    """Result of one operation, modulo 1000.

    Example:
        >>> evaluate_step(15, "-", 63)
        952
    """
    if operator == "*":
        return left * right % MODULUS
    return (left + right if operator == "+" else left - right) % MODULUS


def split_chain(chain: str) -> tuple[int, list[tuple[str, int]]]:
    """First number of a chain, then each operator with the number after it.

    Example:
        >>> split_chain("63*15-43=")
        (63, [('*', 15), ('-', 43)])
    """
    first, *rest = re.findall(r"[+*-]?\d+", chain)
    return int(first), [(term[0], int(term[1:])) for term in rest]


def solve(chain: str) -> int:
    """Value of a chain, strictly from left to right, modulo 1000.

    Example:
        >>> solve("63*15-43=")
        902
    """
    value, steps = split_chain(chain)
    for operator, right in steps:
        value = evaluate_step(value, operator, right)
    return value


def write_answer(chain: str, rng: random.Random | None = None, misconceptions: bool = False) -> str:
    r"""Write out the steps of a chain.

    Args:
        chain: The prompt, e.g. `"63*15-43="`.
        rng: Source of errors and separators. None writes the clean answer.
        misconceptions: Subtractions by numbers that end in 7 or 9 are wrong at `MISCONCEPTION_RATE`, and nothing else
            is, instead of slips in all sums and differences; and two separators follow each step.

    Returns:
        The steps and the boxed value: that of `solve` in a clean answer, what the errors led to in a human-like one.

    Example:
        >>> write_answer("63*15-43=")
        '63*15=945;945-43=902;\\boxed{902}'
        >>> write_answer("63*15-43=", random.Random(3))
        '63*15=945;945-43=912;\\boxed{912}'
        >>> write_answer("63*15-47=", random.Random(3), misconceptions=True)
        '63*15=945;;945-47=908;;\\boxed{908}'
    """
    value, steps = split_chain(chain)
    answer = ""
    for operator, right in steps:
        result, separator = evaluate_step(value, operator, right), ";"
        if rng is not None:
            num_separators = 2 if misconceptions else 1
            separator = "".join(rng.choices(list(SEPARATORS), list(SEPARATORS.values()), k=num_separators))
            if misconceptions:
                rate = MISCONCEPTION_RATE if operator == "-" and right % 10 in MISCONCEPTION_DIGITS else 0.0
            else:
                rate = 0.0 if operator == "*" else SLIP_RATE
            if rate and rng.random() < rate:  # the carry or the borrow is forgotten
                result = (result + (10 if operator == "-" else -10)) % MODULUS
        answer += f"{value}{operator}{right}={result}{separator}"
        value = result
    return answer + rf"\boxed{{{value}}}"


def sample_chain(rng: random.Random, length: int) -> str:
    """Draw a chain of `length` two-digit numbers.

    Example:
        >>> sample_chain(random.Random(0), 3)
        '59-15-61='
    """
    chain = str(rng.randint(10, 99))
    for _ in range(length - 1):
        operator = "*" if rng.random() < MULTIPLICATION_RATE else rng.choice("+-")
        chain += f"{operator}{rng.randint(10, 99)}"
    return chain + "="


def bucket(chain: str) -> int:
    """Hash bucket of a prompt, 0 to 99; the same on every machine.

    Example:
        >>> bucket("63*15-43=")
        82
    """
    return int.from_bytes(hashlib.blake2b(chain.encode(), digest_size=8).digest()) % 100


def sample_chains(split: str, rng: random.Random) -> Iterator[str]:
    """Draw prompts of a split endlessly; prompts may repeat.

    Args:
        split: A key of `SPLITS`.
        rng: Source of randomness.
    """
    lengths, buckets = SPLITS[split].lengths, SPLITS[split].buckets
    while True:
        length = rng.choice(lengths)
        # The length is kept when a chain falls outside the split, so that the mixture of lengths is as declared.
        while bucket(chain := sample_chain(rng, length)) not in buckets:
            pass
        yield chain


def arithmetic_dataset(split: str, num_prompts: int | None = None, seed: int = 0) -> Dataset:
    r"""Prompts of a split with their solutions, ready for `GRPOTrainer` with TRL's `accuracy_reward`.

    Args:
        split: A key of `SPLITS`: `"train"`, `"validation"`, `"test_2"` to `"test_5"` (chains of that many numbers), or
            `"base"`, the prompts that the base model learned from. Training never sees five numbers; the base did.
        num_prompts: Number of distinct prompts; defaults to the size in `SPLITS`.
        seed: Selects the prompts. Prompts of different splits are distinct whatever the seed.

    Returns:
        Dataset with the columns `prompt` (conversational) and `solution`.

    Example:
        >>> dataset = arithmetic_dataset("test_3", num_prompts=100)
        >>> dataset[0]
        {'prompt': [{'role': 'user', 'content': '76-20+35='}], 'solution': '\\boxed{91}'}
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    num_prompts = SPLITS[split].num_prompts if num_prompts is None else num_prompts
    if num_prompts < 1:
        raise UserError(f"num_prompts must be at least 1, got {num_prompts}.")
    chains: dict[str, None] = {}  # a set that keeps the order
    for draw, chain in enumerate(sample_chains(split, random.Random(f"{split}/{seed}"))):
        if len(chains) == num_prompts:
            break
        if draw > 5 * num_prompts:
            raise UserError(f"num_prompts={num_prompts} is more than split {split!r} has. Use a smaller number.")
        chains[chain] = None
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": chain}] for chain in chains],
            "solution": [rf"\boxed{{{solve(chain)}}}" for chain in chains],
        }
    )


def arithmetic_tokenizer() -> Qwen2Tokenizer:
    r"""Character-level tokenizer, with `\boxed{` as one token and a chat template that adds nothing to a prompt.

    `AutoTokenizer` loads the tokenizer of any Qwen2 model as a `Qwen2Tokenizer`, with Qwen2's splitting rules, so this
    is one. Without merges it works on characters. Characters outside the task are dropped.

    Example:
        >>> arithmetic_tokenizer().tokenize(r"9+5=14;\boxed{14}")
        ['9', '+', '5', '=', '1', '4', ';', '\\boxed{', '1', '4', '}']
    """
    alphabet = [PAD, EOS, UNKNOWN, BOXED, *"}=+-*0123456789", *SEPARATORS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(alphabet)},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    # Not special: decoding without special tokens must keep the box, which is what the reward looks for.
    tokenizer.add_tokens(AddedToken(BOXED, normalized=False, special=False))
    return tokenizer
