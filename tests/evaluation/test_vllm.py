"""The vLLM engine with vLLM's part played by transformers: what is asked for, and what is made of the answer."""

import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_capo.evaluation import vllm as engine
from trl_capo.evaluation.sampling import TOP_K, sequence_statistics, token_statistics


PROMPTS = ["7+2=", "12*34-5=", "3="]


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    logprobs: int
    seed: int


class FakeLLM:
    """Samples with transformers, one request at a time, and answers in vLLM's form."""

    def __init__(self, path):
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        self.asked = []

    def get_tokenizer(self):
        return self.tokenizer

    @torch.no_grad()
    def generate(self, requests, parameters, use_tqdm):
        results = []
        for request, wanted in zip(requests, parameters, strict=True):
            self.asked.append(wanted)
            generator = torch.Generator().manual_seed(wanted.seed)
            tokens, logprobs, reason = [], [], "length"
            while len(tokens) < wanted.max_tokens:
                logits = self.model(torch.tensor([request["prompt_token_ids"] + tokens])).logits[0, -1]
                token = torch.multinomial((logits / wanted.temperature).softmax(-1), 1, generator=generator).item()
                logps = logits.log_softmax(-1)
                likeliest = logps.topk(min(wanted.logprobs, len(logps))).indices.tolist()
                entries = {t: types.SimpleNamespace(logprob=logps[t].item()) for t in {token, *likeliest}}
                tokens.append(token)
                logprobs.append(entries)
                if token == self.tokenizer.eos_token_id:
                    reason = "stop"
                    break
            output = types.SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=reason)
            results.append(types.SimpleNamespace(outputs=[output]))
        return results


@pytest.fixture
def llm(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=SamplingParams))
    return FakeLLM(tiny_model)


def sample(llm, prompts=PROMPTS, **kwargs):
    return engine.sample_completions_vllm(llm, prompts, **{"num_samples": 3, "max_new_tokens": 9, **kwargs})


def test_samples_and_confidences_are_those_of_the_model(llm, monkeypatch):
    monkeypatch.setattr(engine, "TOP_K", 4)
    monkeypatch.setattr("trl_capo.evaluation.sampling.TOP_K", 4)
    samples = sample(llm, num_samples=10, max_new_tokens=14, temperature=0.7, statistics=True)
    assert samples.truncated.any() and not samples.truncated.all()
    checked = 0
    for p, prompt in enumerate(PROMPTS):
        for n, text in enumerate(samples.completions[p]):
            ids = llm.tokenizer(text)["input_ids"] + [1] * (not samples.truncated[p, n])
            if len(ids) != samples.lengths[p, n]:  # a <pad> in it is not in the text
                continue
            start = llm.tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = llm.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(ids)), ids].mean().item()
            assert samples.mean_logps[p, n] == pytest.approx(expected, abs=1e-5)
            by_token = token_statistics(logits).numpy()[None].astype(float)
            statistics = sequence_statistics(by_token, np.array([len(ids)]))
            for name in ("tail_confidence", "lowest_group_confidence"):
                assert samples.statistics[name][p, n] == pytest.approx(statistics[name][0], abs=1e-5)
            checked += 1
    assert checked >= 4
    assert np.isnan(samples.statistics["self_certainty"]).all()
    assert {wanted.temperature for wanted in llm.asked} == {0.7} and {wanted.logprobs for wanted in llm.asked} == {4}


def test_prompts_sampled_in_parts_give_what_they_give_together(llm):
    whole = sample(llm)
    parts = [sample(llm, PROMPTS[:1]), sample(llm, PROMPTS[1:], first_prompt=1)]
    assert [row for part in parts for row in part.completions] == whole.completions
    seeds = [wanted.seed for wanted in llm.asked[:9]]
    assert len(set(seeds)) == 9
    assert whole.statistics == {} and {wanted.logprobs for wanted in llm.asked} == {0}
    assert sample(llm, seed=1).completions != whole.completions


def test_conversations_go_through_the_chat_template(llm):
    as_messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert sample(llm, as_messages).completions == sample(llm).completions


def test_the_engine_is_asked_for_log_probs_at_temperature_one(monkeypatch):
    made = {}

    def make(model, **options):
        made.update(options, model=model)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=make, __spec__="a fake"))
    engine.load_vllm("some/model", dtype="float32", enforce_eager=True)
    assert made["logprobs_mode"] == "raw_logprobs" and made["max_logprobs"] == TOP_K
    assert (made["model"], made["dtype"], made["enforce_eager"]) == ("some/model", "float32", True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="vllm must be installed"):
        engine.load_vllm("some/model")
