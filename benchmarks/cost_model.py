"""Does `trl_capo.planning.cost` predict times? Fits this machine's speed on one size and predicts the others.

    python benchmarks/cost_model.py

Times these separately, on random tokens in a random Qwen2: a forward pass without gradient, forward and backward with
and without gradient checkpointing, and generation with a cache. For each, it fits FLOPs per second on one size and
length, whose ratio is 1, and predicts the times of the others from their FLOPs alone. A time is the processor time of
one thread, so that other work on the machine does not count, and the minimum of several repeats. Finally, the script
compares published step times with the model.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_capo.planning import cost


RESULTS = Path(__file__).parent / "results"
# Hidden size, MLP size, layers, heads, key and value heads; the vocabulary is 2048.
SIZES = {"1M": (128, 352, 4, 4, 2), "3M": (192, 512, 6, 6, 2), "10M": (384, 1024, 6, 6, 2)}
FITTED = ("3M", 4, 128)
CASES = [FITTED, ("3M", 4, 32), ("3M", 4, 256), ("1M", 4, 128), ("10M", 4, 128)]

# Published steps: completions, GPUs, the vendor's bfloat16 FLOP/s of one GPU, seconds, tokens per completion, and
# whether the source reports them. CAPO's seconds are its whole run divided by its steps, including validation.
ANCHORS = [
    ("CAPO paper, 1.5B, 8 A100", cost.QWEN_1_5B, 1024, 8, 312e12, 144.0, 700, "assumed"),
    ("CAPO paper, 7B, 8 A100", cost.QWEN_7B, 1024, 8, 312e12, 432.0, 700, "assumed"),
    ("NeMo-RL, 8B, 8 H100", cost.LLAMA_8B, 2048, 8, 989e12, 122.0, 795, "reported"),
    ("NeMo-RL, 8B, 16 H100", cost.LLAMA_8B, 2048, 16, 989e12, 97.7, 1060, "reported"),
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats, of which the minimum counts; generation has one"
    )
    parser.add_argument("--name", default="cost_model", help="write results/NAME.json and .md")
    return parser


def make_model(size: str) -> Qwen2ForCausalLM:
    hidden, mlp, layers, heads, kv_heads = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=2048,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def least_seconds(function: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times[1:])


def forward(model, ids) -> None:
    with torch.no_grad():
        model(ids, use_cache=False)


def train(model, ids) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def generate(model, ids) -> None:
    """Take the first quarter of the tokens as the prompt and generate the rest."""
    prompt = ids[:, : ids.size(1) // 4]
    new = ids.size(1) - prompt.size(1)
    model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)


def flops_of(what: str, shape: cost.ModelShape, rows: int, length: int) -> float:
    prompt = length // 4
    return {
        "forward": lambda: cost.forward_flops(shape, rows, length),
        "training": lambda: cost.training_flops(shape, rows, length),
        "training, checkpointing": lambda: cost.training_flops(shape, rows, length, gradient_checkpointing=True),
        "generation": lambda: cost.generation_flops(shape, rows, prompt, length - prompt),
    }[what]()


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    for what, function in {
        "forward": forward,
        "training": train,
        "training, checkpointing": train,
        "generation": generate,
    }.items():
        rate = None
        for size, num_rows, length in CASES:
            model = make_model(size)
            if what == "training, checkpointing":
                model.gradient_checkpointing_enable()
            model.train(what.startswith("training"))
            ids = torch.randint(2, 2048, (num_rows, length))
            repeats = args.repeats if what != "generation" else 1
            measured = least_seconds(lambda: function(model, ids), repeats)  # noqa: B023
            flops = flops_of(what, cost.shape_of(model.config), num_rows, length)
            rate = rate or flops / measured
            predicted = cost.seconds(flops, flops_per_second=rate, utilisation=1.0)
            rows.append(
                {
                    "what": what,
                    "size": size,
                    "rows": num_rows,
                    "length": length,
                    "gigaflops": flops / 1e9,
                    "measured": measured,
                    "predicted": predicted,
                    "ratio": predicted / measured,
                }
            )
            print(
                f"{what}, {size}, {num_rows} x {length}: {measured:.3f} s, ratio {predicted / measured:.2f}",
                flush=True,
            )
    return rows


def anchors() -> list[dict]:
    """Compare published steps with the model, without padding and with two passes without gradient.

    The guess assumes training at 0.4 and generation at 0.05 of the vendor's FLOP/s, and prompts of 150 tokens. It
    shows how far off the model is without any fit.
    """
    rows = []
    for name, shape, completions, devices, rate, reported, length, source in ANCHORS:
        step = cost.step_cost(
            shape, rows=completions, prompt_length=150, completion_length=length, passes=2, gradient_checkpointing=True
        )
        guessed = cost.step_seconds(
            step, flops_per_second=rate, training_utilisation=0.4, generation_utilisation=0.05, devices=devices
        )
        rows.append(
            {
                "name": name,
                "completions": completions,
                "length": length,
                "length_is": source,
                "petaflops": step.flops / 1e15,
                "reported": reported,
                "utilisation": step.flops / (reported * devices * rate),
                "guessed": guessed,
                "ratio": guessed / reported,
            }
        )
    return rows


def to_markdown(results: dict) -> str:
    lines = [f"# The cost model against measured runs ({results['date']})", "", f"`{results['command']}`", ""]
    lines += [results["hardware"], "", "## On this machine", ""]
    lines += ["| what | parameters | rows x tokens | GFLOPs | measured, s | predicted, s | predicted / measured |"]
    lines += ["|---" * 7 + "|"]
    for row in results["measured"]:
        fitted = " (fitted)" if (row["size"], row["rows"], row["length"]) == FITTED else ""
        lines.append(
            f"| {row['what']} | {row['size']} | {row['rows']} x {row['length']} | {row['gigaflops']:.1f} | "
            f"{row['measured']:.3f} | {row['predicted']:.3f} | {row['ratio']:.2f}{fitted} |"
        )
    lines += ["", "## Published steps", ""]
    columns = ["step, as its source reports it", "completions x tokens", "PFLOPs", "reported, s"]
    columns += ["utilisation that this means", "guessed, s", "guessed / reported"]
    lines += ["| " + " | ".join(columns) + " |"]
    lines += ["|---" * 7 + "|"]
    for row in results["anchors"]:
        cells = [
            row["name"],
            f"{row['completions']} x {row['length']} ({row['length_is']})",
            f"{row['petaflops']:.1f}",
        ]
        cells += [f"{row['reported']:g}", f"{row['utilisation']:.3f}", f"{row['guessed']:.0f}", f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    hardware = f"{cpu_name()}, 1 thread, torch {torch.__version__}; load average at the start {load}"
    results = {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "hardware": hardware,
        "measured": measure(args),
        "anchors": anchors(),
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(to_markdown(results))


if __name__ == "__main__":
    main()
