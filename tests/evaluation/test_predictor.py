"""A predictor that abstains: from samples to a threshold, to answers."""

import json
import shutil
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.test_samples import rows
from trl_capo import cli
from trl_capo.calibration.abstention import Abstention, choose_threshold
from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
from trl_capo.evaluation.grade import grade_samples
from trl_capo.evaluation.predictor import SelectivePredictor, choose_abstention, question_confidence, question_table
from trl_capo.evaluation.samples import merge_parts, read_samples, write_part
from trl_capo.evaluation.sampling import sample_completions


def make_samples(folder, num_prompts=200, num_samples=4, benchmark="b"):
    """The surer a sample, the likelier it is right; all right ones answer 1."""
    rng = np.random.default_rng(0)
    sure = np.repeat(rng.random(num_prompts), num_samples)
    correct = (rng.random(len(sure)) < sure).astype(float)
    columns = dict(correct=correct, mean_logp=np.log(0.2 + 0.8 * sure))
    columns["answer"] = ["1" if c else f"wrong {i}" for i, c in enumerate(correct)]
    write_part(folder, benchmark, 0, rows(benchmark, range(num_prompts), num_samples, **columns))
    merge_parts(folder)
    return folder


def test_confidence_of_a_question_by_hand():
    assert question_confidence([None, None], [-0.1, -0.2]) == (None, 0.0)
    answer, confidence = question_confidence(["a", "b", "a", None], np.log([0.3, 0.5, 0.4, 0.9]))
    assert answer == "a" and confidence == pytest.approx(0.7 / 4)


def test_a_threshold_from_samples_is_the_one_from_questions(tmp_path):
    sets = read_samples(make_samples(tmp_path))
    right, confidence = question_table(sets[0])
    assert 0.2 < right.mean() < 0.9
    chosen, expected = choose_abstention(sets, 0.7), choose_threshold(right, confidence, 0.7)
    assert chosen.threshold == expected.threshold is not None
    assert (chosen.num_samples, chosen.confidence) == (4, "perplexity_consistency")


def test_benchmarks_of_different_counts_are_refused(tmp_path):
    sets = read_samples(make_samples(tmp_path / "a")) + read_samples(make_samples(tmp_path / "b", num_samples=2))
    with pytest.raises(ValueError, match="have 2, 4 samples per question"):
        choose_abstention(sets, 0.7)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL), AutoTokenizer.from_pretrained(BASE_MODEL)


def test_predictions_are_selections_of_the_same_samples(policy):
    data = arithmetic_dataset("test_2", 12)
    questions = [prompt[-1]["content"] for prompt in data["prompt"]]
    threshold = Abstention(0.3, 0.8, 0.05, 100, 0.5, 0.9, num_samples=6)
    predictor = SelectivePredictor(*policy, threshold, max_new_tokens=40)
    assert predictor.num_samples == 6
    samples = sample_completions(*policy, data["prompt"], num_samples=6, max_new_tokens=40, progress=False)
    answers, _ = grade_samples(samples, data["solution"], progress=False)
    predictions = predictor.predict(questions)
    for p, said in enumerate(predictions):
        answer, confidence = question_confidence(answers[p], samples.mean_logps[p])
        assert (said.answer, said.confidence) == (answer, pytest.approx(confidence))
        assert said.abstains == (confidence < 0.3)
        assert said.completion in samples.completions[p] and f"{{{answer}}}" in said.completion
    assert {said.abstains for said in predictions} == {True, False}
    assert not any(said.abstains for said in SelectivePredictor(*policy, max_new_tokens=40).predict(questions[:3]))


def test_without_an_answer_it_abstains(policy):
    [said] = SelectivePredictor(*policy, max_new_tokens=1).predict(["12+30="])
    assert (said.answer, said.confidence, said.abstains, said.completion) == (None, 0.0, True, None)


def test_another_number_of_samples_is_refused(policy):
    with pytest.raises(ValueError, match="chosen with num_samples=6, not with 4. Use 6"):
        SelectivePredictor(*policy, Abstention(0.3, 0.8, 0.05, 100, 0.5, 0.9, num_samples=6), num_samples=4)


def test_how_samples_were_drawn_goes_with_the_threshold(policy, tmp_path, capsys):
    """The promise is about the sampler, too: `answer` samples as `evaluate` did, or refuses."""
    out = str(tmp_path / "out")
    command = ["evaluate", "arithmetic-base", "--benchmark", "arithmetic_test_2", "--num_prompts", "60"]
    command += ["--num_samples", "2", "--temperature", "0.6", "--output_dir", out]
    assert cli.main(command) == 0
    model = shutil.copytree(BASE_MODEL, tmp_path / "model")
    assert cli.main(["abstain", f"{out}/arithmetic-base", "--precision", "0.2", "--model", str(model)]) == 0
    sampling = json.loads((model / "abstention.json").read_text())["sampling"]
    assert sampling == {"temperature": 0.6, "max_new_tokens": 64, "system_prompt": None}
    predictor = SelectivePredictor.from_pretrained(model)
    assert (predictor.temperature, predictor.max_new_tokens, predictor.num_samples) == (0.6, 64, 2)
    capsys.readouterr()
    assert cli.main(["answer", str(model), "12+30=", "--temperature", "1"]) == 2
    assert "chosen with temperature=0.6, not with 1.0" in capsys.readouterr().err
    assert cli.main(["answer", str(model), "12+30=", "--system_prompt", "Be brief."]) == 2
    assert "chosen with system_prompt=None, not with 'Be brief.'" in capsys.readouterr().err
    assert cli.main(["answer", str(model), "12+30=", "--fallback_model", "/nowhere/model"]) == 2
    captured = capsys.readouterr()
    assert "/nowhere/model" in captured.err and captured.out == ""


def test_template_variables_go_with_the_threshold(policy, tmp_path, capsys):
    """`evaluate` asks with them, `abstain` records them, `answer` uses them or refuses others."""
    model = shutil.copytree(BASE_MODEL, tmp_path / "model")
    template = AutoTokenizer.from_pretrained(model).chat_template
    template = "{% if hard is defined and hard %}9*9*{% endif %}" + template
    (model / "chat_template.jinja").write_text(template)
    samples = {}
    for name, options in {"plain": [], "hard": ["--chat_template_kwargs", '{"hard": true}']}.items():
        command = ["evaluate", str(model), "--benchmark", "arithmetic_test_2", "--num_prompts", "60", *options]
        assert cli.main([*command, "--num_samples", "2", "--output_dir", str(tmp_path / name)]) == 0
        samples[name] = read_samples(tmp_path / name / "model")[0].grid("completion")[:, 0]
    assert (samples["plain"] != samples["hard"]).mean() > 0.9
    command = ["abstain", str(tmp_path / "hard" / "model"), "--precision", "0.02", "--model", str(model)]
    assert cli.main([*command, "--force"]) == 0
    assert json.loads((model / "abstention.json").read_text())["sampling"]["chat_template_kwargs"] == {"hard": True}
    predictor = SelectivePredictor.from_pretrained(model)
    assert predictor.tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False) == "9*9*1+1="
    capsys.readouterr()
    assert cli.main(["answer", str(model), "12+30=", "--chat_template_kwargs", '{"hard": false}']) == 2
    assert "chosen with chat_template_kwargs={'hard': True}, not with {'hard': False}" in capsys.readouterr().err
    # Samples of a folder that has changed since are no calibration of it.
    (model / "chat_template.jinja").write_text(template + " ")
    assert cli.main([*command, "--force"]) == 2
    assert "has changed since the samples were drawn (chat_template.jinja)" in capsys.readouterr().err


def test_the_system_prompt_is_asked_with(policy):
    plain, asked = (SelectivePredictor(*policy, system_prompt=text) for text in (None, "63*15-"))
    assert asked.predict(["43="])[0].completion.startswith("63*15=") and plain.predict(["43="]) is not None


def test_what_is_left_of_the_context_is_the_default(policy):
    assert SelectivePredictor(*policy)._room(["12+30="]) == 256 - 6


def test_commands_from_samples_to_answers(tmp_path, capsys):
    model = shutil.copytree(BASE_MODEL, tmp_path / "model")
    samples = str(make_samples(tmp_path / "samples"))
    assert cli.main(["abstain", samples, "--precision", "0.7", "--model", str(model)]) == 0
    assert "at least 70% of the answers are right" in capsys.readouterr().out
    saved = json.loads((model / "abstention.json").read_text())
    assert saved["num_samples"] == 4 and 0 < saved["threshold"] < 1

    saved["threshold"] = 2.0  # never
    (model / "abstention.json").write_text(json.dumps(saved))
    question = ["answer", str(model), "12+30=", "--max_new_tokens", "40"]
    assert cli.main(question) == 0
    assert "12+30=  not sure enough" in capsys.readouterr().out
    assert cli.main([*question, "--fallback_model", str(BASE_MODEL), "--show"]) == 0
    out = capsys.readouterr().out
    assert f"asked {BASE_MODEL}" in out and "\\boxed{" in out
    assert cli.main(["answer", str(BASE_MODEL), "12+30=", "--max_new_tokens", "40"]) == 0
    captured = capsys.readouterr()
    assert "has no abstention.json" in captured.err and "(confidence " in captured.out

    never = ["abstain", samples, "--precision", "0.9999", "--model", str(model)]
    before = (model / "abstention.json").read_text()
    assert cli.main(never) == 2
    error = capsys.readouterr().err
    assert "should always abstain" in error and "best precision within reach is about 0.9" in error
    assert "calibrate on about" in error and "--force" in error
    assert (model / "abstention.json").read_text() == before
    assert cli.main([*never, "--force"]) == 0
    assert "should always abstain" in capsys.readouterr().out
    assert json.loads((model / "abstention.json").read_text())["threshold"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "0.7", "--benchmark", "c"], "has no benchmark c, only b"),
        (["--precision", "1.5"], "--precision must be strictly between 0 and 1"),
        (["--precision", "0.7", "--model", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, arguments, message):
    assert cli.main(["abstain", str(make_samples(tmp_path)), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_library_is_named_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["abstain", str(make_samples(tmp_path)), "--precision", "0.7"]) == 2
    assert "scipy must be installed for this" in capsys.readouterr().err
