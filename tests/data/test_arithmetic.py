import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from trl_capo.calibration.metrics import auc_within
from trl_capo.data.arithmetic import (
    BASE_MODEL,
    FLAT_MODEL,
    MISCONCEPTION_RATE,
    MISCONCEPTIONS_MODEL,
    SEPARATORS,
    SLIP_RATE,
    SPLITS,
    arithmetic_dataset,
    arithmetic_tokenizer,
    bucket,
    sample_chain,
    sample_chains,
    solve,
    split_chain,
    write_answer,
)
from trl_capo.evaluation.sampling import sample_completions


def chains(dataset):
    return [messages[0]["content"] for messages in dataset["prompt"]]


def answer_steps(answer):
    """The written steps of an answer, without separators, and its boxed value."""
    body, boxed = answer.split(r"\boxed{")
    for separator in SEPARATORS:
        body = body.replace(separator, "\n")
    return body.splitlines(), boxed.removesuffix("}")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_MODEL)


class TestTask:
    @pytest.mark.parametrize(
        "chain, value", [("63*15-43=", 902), ("10-99=", 911), ("2+3*4=", 20), ("99*99*99=", 299), ("500+500=", 0)]
    )
    def test_solve(self, chain, value):
        assert solve(chain) == value

    def test_clean_answers_are_consistent(self):
        rng = random.Random(0)
        for _ in range(200):
            chain = sample_chain(rng, rng.randint(2, 5))
            steps, boxed = answer_steps(write_answer(chain))
            assert boxed == str(solve(chain))
            assert all(solve(left + "=") == int(right) for left, right in (step.split("=") for step in steps))

    def test_slips_and_separators_have_the_declared_rates(self):
        rng = random.Random(0)
        separators, slips = Counter(), []
        for _ in range(3000):
            chain = sample_chain(rng, 3)
            answer = write_answer(chain, rng)
            separators.update(character for character in answer if character in SEPARATORS)
            for step in answer_steps(answer)[0]:
                left, right = step.split("=")
                error = (int(right) - solve(left + "=")) % 1000
                operator = split_chain(left)[1][0][0]
                assert error in {"+": (0, 990), "-": (0, 10), "*": (0,)}[operator]
                if operator != "*":
                    slips.append(error != 0)
        assert sum(slips) / len(slips) == pytest.approx(SLIP_RATE, abs=0.03)
        for separator, rate in SEPARATORS.items():
            assert separators[separator] / separators.total() == pytest.approx(rate, abs=0.03)

    def test_misconceptions_are_wrong_in_their_context_only(self):
        rng = random.Random(0)
        wrong, separators = [], set()
        for _ in range(3000):
            chain = sample_chain(rng, 3)
            answer = write_answer(chain, rng, misconceptions=True)
            runs = re.findall(r"[;,:|]+", answer)
            assert [len(run) for run in runs] == [2, 2]
            separators.update("".join(runs))
            for step in filter(None, answer_steps(answer)[0]):
                left, right = step.split("=")
                error = (int(right) - solve(left + "=")) % 1000
                operator, number = re.fullmatch(r"\d+(.)(\d+)", left).groups()
                if operator == "-" and number[-1] in "79":
                    wrong.append(error == 10)
                    assert error in (0, 10)
                else:
                    assert error == 0
        assert sum(wrong) / len(wrong) == pytest.approx(MISCONCEPTION_RATE, abs=0.03)
        assert separators == set(SEPARATORS)

    def test_answers_go_on_from_a_slip(self):
        rng = random.Random(0)
        for _ in range(200):
            steps, boxed = answer_steps(write_answer(sample_chain(rng, 4), rng))
            lefts, results = zip(*(step.split("=") for step in steps), strict=True)
            assert [str(split_chain(left)[0]) for left in lefts[1:]] == list(results[:-1])
            assert boxed == results[-1]


class TestSplits:
    def test_no_two_splits_share_a_prompt(self):
        owner = {}
        for split in SPLITS:
            for seed in (0, 1):
                for chain in chains(arithmetic_dataset(split, 600, seed)):
                    assert owner.setdefault(chain, split) == split

    def test_splits_are_disjoint_by_construction(self):
        # Two splits may share hash buckets only if they have no chain length in common.
        for name, split in SPLITS.items():
            for other_name, other in SPLITS.items():
                if name != other_name:
                    same_buckets = set(split.buckets) & set(other.buckets)
                    assert not (same_buckets and set(split.lengths) & set(other.lengths))

    def test_supervised_text_stays_in_its_split(self):
        stream = sample_chains("base", random.Random(0))
        assert all(bucket(next(stream)) in SPLITS["base"].buckets for _ in range(1000))

    @pytest.mark.parametrize("length", [2, 3, 4, 5])
    def test_length_of_test_splits(self, length):
        assert all(len(split_chain(chain)[1]) == length - 1 for chain in chains(arithmetic_dataset(f"test_{length}")))

    def test_deterministic_distinct_and_of_the_size_asked(self):
        first, again = arithmetic_dataset("train", 3000, seed=7), arithmetic_dataset("train", 3000, seed=7)
        assert first.to_dict() == again.to_dict()
        assert len(set(chains(first))) == 3000
        assert chains(first) != chains(arithmetic_dataset("train", 3000, seed=8))

    def test_mixture_of_training_lengths(self):
        lengths = Counter(len(split_chain(chain)[1]) + 1 for chain in chains(arithmetic_dataset("train", 4000)))
        assert lengths[2] / 4000 == pytest.approx(0.5, abs=0.05)  # a few repeats of short chains are dropped
        assert lengths[3] / 4000 == pytest.approx(0.25, abs=0.03)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="split must be one of .*got 'test'"):
            arithmetic_dataset("test")
        with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
            arithmetic_dataset("train", 0)
        with pytest.raises(ValueError, match="Use a smaller number"):
            arithmetic_dataset("test_2", 3_000)


class TestGrading:
    def test_solutions_grade_themselves(self):
        dataset = arithmetic_dataset("test_3", 50)
        gold = dataset["solution"]
        answers = [[{"role": "assistant", "content": write_answer(chain)}] for chain in chains(dataset)]
        assert accuracy_reward(answers, list(gold)) == [1.0] * 50

    @pytest.mark.parametrize("separator", SEPARATORS)
    def test_separators_do_not_disturb_grading(self, separator):
        answer = write_answer("63*15-43=").replace(";", separator)
        wrong = answer.replace("902}", "912}")
        completions = [[{"role": "assistant", "content": text}] for text in (answer, wrong, answer[:-1])]
        assert accuracy_reward(completions, [r"\boxed{902}"] * 3) == [1.0, 0.0, 0.0]


class TestTokenizer:
    def test_shipped_tokenizer_is_the_one_of_the_code(self, tokenizer):
        assert tokenizer.get_vocab() == arithmetic_tokenizer().get_vocab()
        assert tokenizer.chat_template == arithmetic_tokenizer().chat_template

    def test_special_tokens(self, tokenizer):
        assert tokenizer.padding_side == "left"
        assert tokenizer.pad_token_id != tokenizer.eos_token_id

    def test_rendered_prompt_is_the_chain(self, tokenizer):
        prompt = [{"role": "user", "content": "63*15-43="}]
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert rendered == tokenizer("63*15-43=")["input_ids"]
        assert len(rendered) == len("63*15-43=")

    def test_round_trip(self, tokenizer):
        text = "63*15-43=" + write_answer("63*15-43=", random.Random(0))
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == len(text) - len(r"\boxed") + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


class TestBaseModel:
    @pytest.mark.parametrize("path", [BASE_MODEL, FLAT_MODEL, MISCONCEPTIONS_MODEL])
    def test_small_and_float32(self, path):
        assert sum(file.stat().st_size for file in path.iterdir()) < 5_000_000
        model = AutoModelForCausalLM.from_pretrained(path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize(
        ("path", "accuracies", "aucs"),
        [
            (BASE_MODEL, (0.15, 0.5), (0.5, 0.8)),
            (FLAT_MODEL, (0.15, 0.5), (0.85, 1.0)),
            (MISCONCEPTIONS_MODEL, (0.2, 0.55), (0.75, 0.95)),
        ],
    )
    def test_shipped_models_can_be_improved(self, tokenizer, path, accuracies, aucs):
        # Loose bounds: enough groups are mixed; the confidence of the first is poor, that of the others still good.
        dataset = arithmetic_dataset("validation", 64)
        model = AutoModelForCausalLM.from_pretrained(path)
        samples = sample_completions(
            model, tokenizer, list(dataset["prompt"]), num_samples=8, max_new_tokens=64, progress=False
        )
        correct = [
            [text.endswith(solution) for text in texts]
            for texts, solution in zip(samples.completions, dataset["solution"], strict=True)
        ]
        assert samples.truncated.mean() < 0.02
        assert accuracies[0] < np.mean(correct) < accuracies[1]
        assert aucs[0] < auc_within(correct, samples.mean_logps) < aucs[1]
