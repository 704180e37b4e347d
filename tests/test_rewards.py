"""The pooled accuracy reward: TRL's results on anything, and nothing that a completion does stops the run."""

import copy
import functools
import importlib
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import trl.rewards
from trl import GRPOTrainer

from tests.helpers import is_running, prompt_dataset, tiny_trainer
from trl_capo import rewards, workers
from trl_capo.data.rows import check_data
from trl_capo.preflight.rewards import load_reward_function
from trl_capo.rewards import get_accuracy_reward


SLOW = r"\boxed{9^{9^{9^{9}}}}"  # math-verify gives up on it after 5 seconds

# Text and gold: right, wrong, unreadable and odd ones of the kinds that models write and datasets hold.
PAIRS = [
    (r"63*15=945;945-43=902;\boxed{902}", r"\boxed{902}"),
    (r"63*15=945;945-43=902;\boxed{912}", r"\boxed{902}"),
    (r"so \boxed{\frac{2}{6}}", r"$\frac{1}{3}$"),
    (r"so $\boxed{0.5}$ then", r"\frac{1}{2}"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$"),
    (r"\boxed{\{3, 1, 2\}}", r"$\{1,2,3\}$"),
    (r"\boxed{[0,1)\cup(2,\infty)}", r"$[0,1)\cup(2,\infty)$"),
    (r"\boxed{(0,1]}", r"$[0,1)$"),
    (r"\boxed{x^2+2x+1}", r"$(x+1)^2$"),
    (r"\boxed{x = 3}", "$3$"),
    (r"\boxed{5\text{ cm}}", "$5$"),
    (r"\boxed{50\%}", r"$\frac{1}{2}$"),
    ("we know that $a<b$. " * 150 + r"Hence \boxed{\sqrt{8}}", r"$2\sqrt{2}$"),
    (r"\boxed{1} no, \boxed{2}", "$2$"),
    (r"\boxed{\frac{1}{", "$1$"),
    ("the answer is 7", "$7$"),
    ("", "$7$"),
    ("\\boxed{7} \ud800 \x00 ε", "$7$"),
    (r"\boxed{7}", "east $ or west"),
    (r"\boxed{7}", ""),
    (r"\boxed{7}", 7),
]


def as_completions(texts) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def graded(function, pairs) -> tuple[list, dict[str, list]]:
    """Rewards and logged columns."""
    columns = {}
    texts, golds = zip(*pairs, strict=True)
    return function(completions=as_completions(texts), solution=list(golds), log_extra=columns.__setitem__), columns


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def make_reward():
    """Makes rewards that are stopped when the test is over."""
    made = []

    def make(**kwargs):
        made.append(get_accuracy_reward(**kwargs))
        assert made[-1](as_completions([r"\boxed{1}"]), ["$1$"]) == [1.0]  # starts the workers
        return made[-1]

    yield make
    for function in made:
        function.stop()


@pytest.fixture(scope="module")
def reward():
    """For tests in which no worker is lost."""
    function = get_accuracy_reward(num_workers=2)
    assert function(as_completions([r"\boxed{1}"]), ["$1$"]) == [1.0]
    yield function
    function.stop()


@pytest.fixture
def submitted(reward, monkeypatch):
    """The texts that reach the workers of `reward`."""
    texts = []
    schedule = reward.workers._pool.schedule

    def remember(function, args, **kwargs):
        texts.append(args[0])
        return schedule(function, args, **kwargs)

    monkeypatch.setattr(reward.workers._pool, "schedule", remember)
    return texts


def test_results_and_columns_are_those_of_trl(reward):
    pairs = PAIRS * 2
    expected = graded(trl.rewards.accuracy_reward, pairs)
    assert set(expected[0]) == {1.0, 0.0, None}
    assert graded(reward, pairs) == expected
    assert reward([], []) == []


def test_name_and_arguments_are_those_of_trl(reward):
    assert reward.__name__ == rewards.accuracy_reward.__name__ == trl.rewards.accuracy_reward.__name__
    completions = as_completions([r"\boxed{7}"])
    assert reward(completions, ["$7$"], prompts=["?"], completion_ids=[[1]], trainer_state=None) == [1.0]
    with pytest.raises(ValueError, match="zip"):
        reward(completions, ["$7$", "$8$"])


def test_what_a_worker_raises_is_raised(reward, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="interpreted as an integer"):
        patch.setattr(reward.workers, "function", int)
        graded(reward, PAIRS)
    with pytest.raises(TypeError, match="pickle"):
        reward(as_completions([""]), [threading.Lock()])
    assert graded(reward, PAIRS[:2])[0] == [1.0, 0.0]


def test_a_failed_preparation_shows_what_failed_and_a_pool_loads_what_it_is_given():
    fails = functools.partial(importlib.import_module, "nothing_there")
    missing = workers.DeadlinePool(fails, num_workers=1, prepare=fails)
    with pytest.raises(ModuleNotFoundError, match="nothing_there"):
        missing.results([()])
    missing.stop()
    plain = workers.DeadlinePool(eval, num_workers=1)
    assert plain.results([("'math_verify' in __import__('sys').modules",)]) == [False]
    plain.stop()


def test_a_pair_is_graded_once(reward, submitted):
    texts = [r"\boxed{1}", r"\boxed{2}", r"\boxed{1}", r"\boxed{1}"]
    assert reward(as_completions(texts), ["$1$", "$2$", "$1$", "$3$"]) == [1.0, 1.0, 1.0, 0.0]
    assert submitted == [r"\boxed{1}", r"\boxed{2}", r"\boxed{1}"]


def test_a_call_collects_what_start_began(reward, submitted):
    begun, other = as_completions([r"\boxed{1}", r"\boxed{2}"]), as_completions([r"\boxed{3}"])
    reward.start(begun, ["$1$", "$1$"], prompts=["?", "?"])
    assert reward(other, ["$3$"]) == [1.0]
    assert submitted == [r"\boxed{1}", r"\boxed{2}", r"\boxed{3}"]
    assert reward([*other, *begun], ["$1$"] * 3) == [0.0, 1.0, 0.0]
    assert submitted[3:] == [r"\boxed{3}"]
    assert not reward.workers._pending
    assert reward(begun, ["$1$", "$1$"]) == [1.0, 0.0]
    assert len(submitted) == 6  # nothing is remembered from call to call


def test_start_neither_waits_nor_keeps_what_was_not_collected(make_reward):
    reward = make_reward(num_workers=1)
    reward.start(as_completions([SLOW]), ["$1$"])
    dropped = next(iter(reward.workers._pending.values()))
    reward.start(as_completions([r"\boxed{2}"]), ["$2$"])
    assert dropped.cancelled() or not dropped.done(), "nobody waited for it"
    assert len(reward.workers._pending) == 1
    assert reward(as_completions([r"\boxed{2}"]), ["$2$"]) == [1.0]
    assert len(reward.workers._pending) == 0


def test_a_stuck_item_is_wrong_and_holds_nobody_up(make_reward):
    reward = make_reward(num_workers=2, deadline=4.0)
    pairs = [(SLOW, "$1$"), *((rf"\boxed{{{n}}}", "$1$") for n in range(100)), (SLOW, "$1$")]
    begin, done = time.monotonic(), []
    reward.start(as_completions(text for text, _ in pairs), [gold for _, gold in pairs])
    for future in list(reward.workers._pending.values())[1:]:
        future.add_done_callback(lambda _: done.append(time.monotonic() - begin))
    with pytest.warns(
        UserWarning, match="2 of 102 completions count as neither right nor wrong .* deadline of 4 s"
    ) as caught:
        results, columns = graded(reward, pairs)
    assert len(done) == 100 and max(done) < time.monotonic() - begin, "the others were done before the stuck ones"
    assert len(caught) == 1
    assert results == [None, 0.0, 1.0, *[0.0] * 98, None]
    assert (columns["gold_parsed"][-1], columns["answer_parsed"][-1]) == ("[timeout]", "[timeout]")
    assert columns["answer_parsed"][:3] == ["[timeout]", "[0, '0']", "[1, '1']"]
    assert graded(reward, PAIRS[:4]) == graded(trl.rewards.accuracy_reward, PAIRS[:4])


def test_an_item_stuck_in_c_is_ended_at_once(make_reward):
    reward = make_reward(num_workers=2)
    begin = time.monotonic()
    stuck = reward.workers._pool.schedule(eval, ("sum(range(10**10))",), timeout=0.5)
    with pytest.raises(TimeoutError):
        stuck.result()
    assert reward(as_completions([r"\boxed{1}"]), ["$1$"]) == [1.0]
    assert time.monotonic() - begin < 30  # the sum takes minutes, and Python does not hear a polite request while in C


def test_a_worker_that_dies_costs_one_item(make_reward):
    reward = make_reward(num_workers=1)
    worker = reward.workers._pool.schedule(os.getpid).result()
    reward.start(as_completions([SLOW]), ["$1$"])
    [future] = reward.workers._pending.values()
    wait_until(future.running)
    os.kill(worker, signal.SIGKILL)
    with pytest.warns(UserWarning, match="1 of 2 completions count as neither right nor wrong"):
        results, columns = graded(reward, [(SLOW, "$1$"), (r"\boxed{1}", "$1$")])
    assert results == [None, 1.0]
    assert columns["answer_parsed"] == ["[crashed]", "[1, '1']"]


@pytest.mark.parametrize("noticed", [True, False])
def test_workers_killed_while_idle_are_replaced(make_reward, noticed):
    reward = make_reward(num_workers=1)
    pool, worker = reward.workers._pool, reward.workers._pool.schedule(os.getpid).result()
    os.kill(worker, signal.SIGKILL)
    if noticed:
        wait_until(lambda: not pool.active)
    texts = [rf"{n} \boxed{{1}}" + " " * 5000 for n in range(100)]  # more than the pipe to the workers holds
    assert reward(as_completions(texts), ["$1$"] * 100) == [1.0] * 100


def test_workers_restart_after_stop_and_hold_no_torch(make_reward):
    reward = make_reward(num_workers=2)
    reward.stop()
    assert reward(as_completions([r"\boxed{1}"]), ["$1$"]) == [1.0]
    modules = reward.workers._pool.schedule(eval, ("set(__import__('sys').modules)",)).result()
    assert "sympy" in modules and not modules & {"torch", "numpy", "transformers", "datasets", "pytest"}


def test_it_works_from_threads_with_timeouts(reward):
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(graded, reward, PAIRS[n:]) for n in range(4)]
        expected = graded(trl.rewards.accuracy_reward, PAIRS)[0]
        for n, call in enumerate(calls):
            assert call.result()[0] == expected[n:]


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda function: pickle.loads(pickle.dumps(function))])
def test_copies_have_their_own_workers(transform):
    function = transform(get_accuracy_reward(num_workers=3, deadline=7.0))
    assert (function.workers.num_workers, function.workers.deadline, function.workers._pool) == (3, 7.0, None)


def test_workers_share_the_cores_with_the_other_ranks(monkeypatch):
    for cores, ranks, expected in [(2, None, 2), (64, None, 16), (64, 8, 8), (4, 8, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert workers._default_workers() == expected


@pytest.mark.parametrize(("option", "value"), [("num_workers", 0), ("deadline", 0.0), ("deadline", math.nan)])
def test_bad_options_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
        get_accuracy_reward(**{option: value})


# Without `if __name__ == "__main__"`, as many training scripts are.
SCRIPT = r"""
from trl_capo.rewards import accuracy_reward
print("started")
print(accuracy_reward([[{"content": r"\boxed{7}"}]] * 2, ["$7$", "$8$"]))
accuracy_reward.start([[{"content": r"\boxed{9^{9^{9^{9}}}}"}]], ["$7$"])  # and is gone before it is done
"""

# Its processes wait for their children, which a daemonic one may not have.
GUARDED_SCRIPT = f"""
import multiprocessing
def work():{SCRIPT.replace(chr(10), chr(10) + "    ")}
if __name__ == "__main__":
    for daemon in (False, True):
        process = multiprocessing.get_context("spawn").Process(target=work, daemon=daemon)
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def test_scripts_run_once_and_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "guarded.py").write_text(GUARDED_SCRIPT)
    forms = {
        "file": (["script.py"], None),
        "module": (["-m", "script"], None),
        "stdin": (["-"], SCRIPT),
        "multiprocessing": (["guarded.py"], None),
    }
    running = {
        form: subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for form, (arguments, _) in forms.items()
    }
    try:
        for form, process in running.items():
            output, errors = process.communicate(forms[form][1], timeout=60)
            assert (process.returncode, errors) == (0, ""), form
            times = 2 if form == "multiprocessing" else 1
            assert output == "started\n[1.0, 0.0]\n" * times, form
    finally:
        for process in running.values():
            process.kill()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks processes up in /proc")
def test_workers_end_with_a_run_that_is_killed(tmp_path):
    script = (
        SCRIPT + "print(accuracy_reward.workers._pool.schedule(__import__('os').getpid).result(), flush=True); input()"
    )
    script = script.replace(r"\boxed{9^{9^{9^{9}}}}", "later")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int([process.stdout.readline() for _ in range(3)][-1])
    assert is_running(worker)
    process.kill()
    process.communicate()
    wait_until(lambda: not is_running(worker))


def test_it_trains_as_with_trl(tiny_model, tmp_path, reward):
    logs = []
    for name, function in {"trl": trl.rewards.accuracy_reward, "pool": reward}.items():
        dataset = prompt_dataset(solution=["$7$"] * 32)
        trainer = tiny_trainer(GRPOTrainer, tiny_model, tmp_path / name, function, dataset=dataset)
        trainer.train()
        metrics = {key: value for key, value in trainer.state.log_history[0].items() if "reward" in key}
        logs.append((metrics, list(trainer._logs["extra"]["answer_parsed"])))
    assert logs[0] == logs[1]
    assert "rewards/accuracy_reward/mean" in logs[0][0] and len(logs[0][1]) == 8


def test_recipes_get_the_pooled_one():
    assert load_reward_function("accuracy_reward") is rewards.accuracy_reward
    assert load_reward_function("think_format_reward") is trl.rewards.think_format_reward
    for name in ("get_accuracy_reward", "wait", "AccuracyReward"):
        with pytest.raises(ValueError, match=f"'{name}' is not in trl.rewards or trl_capo.rewards"):
            load_reward_function(name)


@pytest.mark.parametrize("function", [rewards.accuracy_reward, get_accuracy_reward(num_workers=1)])
def test_gold_answers_are_checked(function):
    with pytest.raises(ValueError, match="math-verify cannot parse 1 of 2 gold answers"):
        check_data([function], train_dataset=prompt_dataset(2, solution=["$7$", "east"]))


def test_starting_workers_leaves_main_to_other_threads():
    """A checkpoint that another thread pickles meanwhile may hold classes of the running script."""
    main, seen, done = sys.modules["__main__"], set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(sys.modules["__main__"] is main)

    watcher = threading.Thread(target=watch)
    watcher.start()
    reward = rewards.get_accuracy_reward(num_workers=1)
    try:
        assert graded(reward, PAIRS[:1]) == graded(trl.rewards.accuracy_reward, PAIRS[:1])
    finally:
        done.set()
        watcher.join()
        reward.stop()
    assert seen == {True}


FORKED = r"""
import os, threading, time
from trl_capo.rewards import get_accuracy_reward

def reward_of(text):
    return reward([[{"content": text}]], ["$7$"])

reward = get_accuracy_reward(num_workers=1)
print(reward_of(r"\boxed{7}"), flush=True)
reward.start([[{"content": r"\boxed{6}"}]], ["$7$"])
held, done = threading.Event(), threading.Event()
def hold():
    with reward.workers._lock:  # as a call in another thread does
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
if os.fork() == 0:
    try:
        print("child", reward_of(r"\boxed{8}"), reward_of(r"\boxed{7}"), flush=True)
        reward.stop()
    finally:
        os._exit(0)
os.wait()
done.set()
thread.join()
print(reward_of(r"\boxed{6}"), reward_of(r"\boxed{7}"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_parent_and_child_have_their_own_workers():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[1.0]", "child [0.0] [1.0]", "[0.0] [1.0]"], done.stderr


def test_warnings_of_math_verify_are_cut(caplog):
    with caplog.at_level("WARNING", logger="math_verify.parser"):
        logging.getLogger("math_verify.parser").warning("Timeout during parsing: %s", "x" * 100_000)
    [message] = caplog.messages
    assert len(message) < 400 and "[99724 characters left out]" in message
