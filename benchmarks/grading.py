r"""What grading costs: compares TRL's accuracy_reward with the one in worker processes, on the same completions.

    python benchmarks/grading.py

There are three kinds of completions, eight per prompt, half of them wrong: those of the arithmetic world; 2000
characters of text around a LaTeX answer (fractions, roots, polynomials, sets, intervals, matrices); and the latter
with one item that blocks math-verify for 11 seconds. Every repeat draws new completions, because sympy caches old
ones. The times are medians.

    trl        seconds of TRL's function
    pool-N     seconds of a call with N workers, which are already running
    overlap-N  seconds that `start` and the later call take if the caller uses the GPU in between

The table and `benchmarks/results/grading.json` also show how many pairs were distinct, and whether the rewards and the
three logged columns equal TRL's. Takes ten minutes on two cores.

    python benchmarks/grading.py --evaluation

What grading an evaluation costs: grades 10,000 distinct completions of the second kind with
`trl_capo.evaluation.grade` and with the same function in a loop; then with a deadline of 2 seconds, while every
hundredth completion blocks math-verify for 10 seconds. Writes `benchmarks/results/grading_evaluation.json` in five
minutes.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import wait
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import trl.rewards

from trl_capo.data.arithmetic import sample_chains, solve, write_answer
from trl_capo.evaluation import grade
from trl_capo.rewards import get_accuracy_reward


RESULTS = Path(__file__).parent / "results"
NUM_GENERATIONS = 8
STUCK = r"\boxed{\frac{3^{2500000}+1}{7^{1250000}+2}}"
SENTENCE = r"Since $a_{n+1} = \frac{a_n + 3}{2}$ for all $n \geq 1$, the term $a_n$ is bounded by $3$. "

Pair = tuple[str, str]  # text and solution


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="kinds of completions")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="completions per call")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes")
    parser.add_argument("--repeats", type=int, default=3, help="repeats, each with other completions")
    parser.add_argument("--evaluation", action="store_true", help="grade an evaluation instead")
    parser.add_argument("--items", type=int, default=10_000, help="completions of the evaluation")
    return parser


def arithmetic_pairs(rng: random.Random) -> Iterator[Pair]:
    for chain in sample_chains("train", rng):
        for _ in range(NUM_GENERATIONS):
            yield write_answer(chain, rng), rf"\boxed{{{solve(chain)}}}"


def latex_pairs(rng: random.Random) -> Iterator[Pair]:
    """Answers in a form that differs from the gold answer's; half of them contain a different number."""
    while True:
        a, b, c = (rng.randint(2, 60) for _ in range(3))
        write = [
            lambda x, b=b, c=c: (rf"\frac{{{x * c}}}{{{b * c}}}", rf"\frac{{{x}}}{{{b}}}"),
            lambda x, b=b: (rf"\sqrt{{{x * b * b}}}", rf"{b}\sqrt{{{x}}}"),
            lambda x, b=b: (rf"x^2 + {x + b}x + {x * b}", rf"(x+{x})(x+{b})"),
            lambda x, b=b, c=c: (rf"\{{{c + 60}, {x}, {-b}\}}", rf"\{{{-b}, {x}, {c + 60}\}}"),
            lambda x, b=b: (rf"[{-b}, {x}) \cup (60, \infty)", rf"[{-b},{x})\cup(60,\infty)"),
            lambda x, b=b, c=c: (
                rf"\begin{{pmatrix}} {x} & {b} \\ \frac{{{2 * c}}}{{2}} & 0 \end{{pmatrix}}",
                rf"\begin{{pmatrix}}{x}&{b}\\{c}&0\end{{pmatrix}}",
            ),
        ][rng.randrange(6)]
        for _ in range(NUM_GENERATIONS):
            answer = write(a if rng.random() < 0.5 else rng.randint(2, 60))[0]
            text = f"{SENTENCE * 12}Step {rng.randint(0, 9)}: " + rf"\boxed{{{answer}}}. {SENTENCE * 12}"
            yield text, f"${write(a)[1]}$"


def stuck_pairs(rng: random.Random) -> Iterator[Pair]:
    yield STUCK, "$7$"
    yield from latex_pairs(rng)


KINDS = {"arithmetic": arithmetic_pairs, "latex": latex_pairs, "latex, one stuck": stuck_pairs}


def timed(function, pairs: list[Pair]) -> tuple[float, tuple]:
    """The seconds of a call, and its rewards and columns."""
    columns = {}
    completions = [[{"role": "assistant", "content": text}] for text, _ in pairs]
    begin = time.perf_counter()
    rewards = function(completions, [gold for _, gold in pairs], log_extra=columns.__setitem__)
    return time.perf_counter() - begin, (rewards, columns)


def overlapped(reward, pairs: list[Pair]) -> tuple[float, tuple]:
    """The seconds of `start` plus those of a call after everything is graded."""
    completions = [[{"role": "assistant", "content": text}] for text, _ in pairs]
    begin = time.perf_counter()
    reward.start(completions, [gold for _, gold in pairs])
    seconds = time.perf_counter() - begin
    wait(reward.workers._pending.values())
    called, results = timed(reward, pairs)
    return seconds + called, results


def measure(kind: str, size: int, rewards: dict[int, object], repeats: int) -> dict:
    """One line of the table."""
    seconds, equal, correct, distinct = {}, True, [], []
    for repeat in range(repeats):
        pairs = list(islice(KINDS[kind](random.Random(f"{kind}/{size}/{repeat}")), size))
        spent, expected = timed(trl.rewards.accuracy_reward, pairs)
        seconds.setdefault("trl", []).append(spent)
        correct.append(statistics.mean(expected[0]))
        distinct.append(len(set(pairs)))
        for workers, reward in rewards.items():
            for name, run in {"pool": timed, "overlap": overlapped}.items():
                spent, results = run(reward, pairs)
                seconds.setdefault(f"{name}-{workers}", []).append(spent)
                equal &= results == expected
    return {
        "kind": kind,
        "completions": size,
        "distinct": statistics.median(distinct),
        "correct": round(statistics.mean(correct), 3),
        "equal": equal,
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
    }


def measure_evaluation(num_items: int) -> dict:
    """The seconds of the pool and of a loop for distinct completions, and of the pool if one in a hundred hangs."""
    pairs, drawn = {}, latex_pairs(random.Random("evaluation"))
    while len(pairs) < num_items:
        pairs[next(drawn)] = None
    pairs = list(pairs)
    grade.grade(["\\boxed{1}"], ["$1$"], progress=False)  # starts the workers
    begin = time.perf_counter()
    pooled = grade.grade(*zip(*pairs, strict=True), progress=False)
    pool = time.perf_counter() - begin

    hanging = list(pairs)
    hanging[::100] = [
        (rf"\boxed{{\frac{{3^{{{2500000 + i}}}+1}}{{7^{{1250000}}+2}}}}", "$7$") for i in range(0, num_items, 100)
    ]
    grade.grade(["\\boxed{1}"], ["$1$"], deadline=2.0, progress=False)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survived = grade.grade(*zip(*hanging, strict=True), deadline=2.0, progress=False)
    with_hanging = time.perf_counter() - begin

    begin = time.perf_counter()  # last, because workers forked from this process would inherit sympy's cache
    looped = [grade._grade_and_extract(*pair) for pair in pairs]
    loop = time.perf_counter() - begin
    others = np.arange(num_items) % 100 != 0
    return {
        "items": num_items,
        "seconds": {"loop": round(loop, 1), "pool": round(pool, 1), "pool, 1% hanging": round(with_hanging, 1)},
        "times_faster": round(loop / pool, 2),
        "equal": pooled.correct.tolist() == [reward for reward, _, _ in looped]
        and pooled.answers == [answer for _, answer, _ in looped],
        "hanging_given_up": int(survived.failed[~others].sum()),
        "others_given_up": int(survived.failed[others].sum()),
        "others_equal": bool((survived.correct[others] == pooled.correct[others]).all()),
    }


def hardware() -> str:
    models = (
        [line for line in open("/proc/cpuinfo") if line.startswith("model name")] if sys.platform == "linux" else []
    )
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    return f"{platform.machine()} {name}, {os.cpu_count()} cores"


def main() -> None:
    args = make_parser().parse_args()
    about = {
        "command": " ".join(["python", "benchmarks/grading.py", *sys.argv[1:]]),
        "date": str(date.today()),
        "hardware": hardware(),
        "load": os.getloadavg()[0],
        "repeats": args.repeats,
    }
    if args.evaluation:
        about |= measure_evaluation(args.items)
        print(json.dumps(about, indent=1))
        (RESULTS / "grading_evaluation.json").write_text(json.dumps(about, indent=1) + "\n")
        return
    timed(trl.rewards.accuracy_reward, list(islice(arithmetic_pairs(random.Random(0)), 64)))  # for its imports
    rewards, start_up = {}, {}
    for workers in args.workers:
        rewards[workers] = get_accuracy_reward(num_workers=workers)
        start_up[f"pool-{workers}"] = round(timed(rewards[workers], [("", "$1$")])[0], 3)
        timed(rewards[workers], list(islice(arithmetic_pairs(random.Random(0)), 64)))  # gives every worker an item
    columns = ["trl", *(f"{name}-{workers}" for workers in args.workers for name in ("pool", "overlap"))]
    print(f"first call, seconds: {start_up}\n\n| kind | completions | distinct | {' | '.join(columns)} | equal |")
    print("|---" * (len(columns) + 4) + "|")
    rows = []
    for kind in args.kinds:
        for size in args.sizes:
            rows.append(measure(kind, size, rewards, args.repeats))
            seconds = " | ".join(f"{rows[-1]['seconds'][name]:.3f}" for name in columns)
            print(f"| {kind} | {size} | {rows[-1]['distinct']} | {seconds} | {rows[-1]['equal']} |", flush=True)
    (RESULTS / "grading.json").write_text(json.dumps(about | {"first_call": start_up, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
