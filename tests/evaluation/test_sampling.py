import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig

from trl_capo.evaluation import sampling as sample_module
from trl_capo.evaluation.sampling import STATISTICS, sample_completions, sequence_statistics


PROMPTS = ["7+2=", "1", "12*34-5=", "9-9", "3=", "44+44+44="]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def sample(model, tokenizer, prompts=PROMPTS, **kwargs):
    defaults = {"num_samples": 5, "max_new_tokens": 12, "progress": False}
    return sample_completions(model, tokenizer, prompts, **{**defaults, **kwargs})


def assert_same(a, b, mean_logps=1e-5):
    assert a.completions == b.completions
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.truncated, b.truncated)
    np.testing.assert_allclose(a.mean_logps, b.mean_logps, atol=mean_logps)


@torch.no_grad()
def token_logps(model, prompt_ids, completion_ids):
    """Log-probs of a completion from one forward over the sequence alone, without padding or cache."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(completion_ids)), completion_ids].numpy()


def assert_untempered_mean_logps(samples, model, tokenizer, prompts=PROMPTS):
    checked = 0
    for p, prompt in enumerate(prompts):
        for n, text in enumerate(samples.completions[p]):
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (not samples.truncated[p, n])
            # The text leaves special tokens out, so a completion that contains <pad> cannot be rebuilt from it.
            if len(ids) == samples.lengths[p, n]:
                expected = token_logps(model, tokenizer(prompt)["input_ids"], ids).mean()
                assert samples.mean_logps[p, n] == pytest.approx(expected, abs=1e-4)
                checked += 1
    assert checked >= samples.lengths.size / 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [4, 256])
def test_mean_logps_equal_an_unpadded_untempered_forward(model, tokenizer, temperature, batch_size):
    samples = sample(model, tokenizer, temperature=temperature, batch_size=batch_size)
    assert samples.mean_logps.dtype == np.float64
    assert samples.truncated.any()
    assert not samples.truncated.all()
    assert np.all(samples.lengths[samples.truncated] == 12)
    assert_untempered_mean_logps(samples, model, tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
        GPT2Config(n_embd=16, n_layer=2, n_head=2),
        Gemma3TextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=5,  # shorter than prompt and completion
            layer_types=["sliding_attention", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config, tokenizer):
    torch.manual_seed(0)
    config.update({"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None})
    model = AutoModelForCausalLM.from_config(config).eval()
    samples = sample(model, tokenizer, max_new_tokens=16)
    assert_untempered_mean_logps(samples, model, tokenizer)


def test_first_tokens_follow_the_tempered_distribution(model, tokenizer):
    samples = sample(model, tokenizer, ["7+2="], num_samples=4000, max_new_tokens=1, temperature=0.5)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("7+2=")["input_ids"]])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1)
    counts = {text: samples.completions[0].count(text) / 4000 for text in tokenizer.get_vocab()}
    for text, token in tokenizer.get_vocab().items():
        if token not in tokenizer.all_special_ids:
            p = expected[token].item()
            assert counts[text] == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5 + 1e-3)
    assert np.mean(~samples.truncated) == pytest.approx(expected[tokenizer.eos_token_id].item(), abs=0.03)


def test_a_seed_gives_one_result_whatever_came_before(model, tokenizer):
    torch.manual_seed(1)
    first = sample(model, tokenizer, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    second = sample(model, tokenizer, seed=3)
    assert_same(first, second, mean_logps=0)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    assert first.completions != sample(model, tokenizer, seed=4).completions


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_batching_changes_nothing(model, tokenizer, batch_size):
    assert_same(sample(model, tokenizer), sample(model, tokenizer, batch_size=batch_size))


def test_more_samples_or_prompts_keep_the_ones_there_were(model, tokenizer):
    few = sample(model, tokenizer, PROMPTS[:3], num_samples=3)
    many = sample(model, tokenizer, PROMPTS, num_samples=8)
    assert [row[:3] for row in many.completions[:3]] == few.completions
    np.testing.assert_allclose(many.mean_logps[:3, :3], few.mean_logps, atol=1e-5)


def test_samples_of_one_prompt_differ(model, tokenizer):
    samples = sample(model, tokenizer, ["7+2=", "7+2="], num_samples=16)
    assert len(set(samples.completions[0])) > 8
    assert samples.completions[0] != samples.completions[1]


def test_conversational_prompts_go_through_the_chat_template(model, tokenizer):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert_same(sample(model, tokenizer), sample(model, tokenizer, conversations))  # the template adds nothing


def test_every_declared_eos_ends_a_completion(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    semicolon = tokenizer.convert_tokens_to_ids(";")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, semicolon]
    samples = sample(model, tokenizer, num_samples=40)
    texts = [text for row in samples.completions for text in row]
    assert any(text.endswith(";") for text in texts)
    assert not any(";" in text[:-1] for text in texts)


def test_the_generation_config_does_not_change_the_distribution(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = sample(model, tokenizer)
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=2.0)
    assert_same(plain, sample(model, tokenizer), mean_logps=0)


def test_the_model_keeps_its_mode_and_its_gradients(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    sample(model, tokenizer)
    assert model.training
    model(torch.tensor([[2, 3]])).logits.sum().backward()
    assert model.eval() is model
    sample(model, tokenizer)
    assert not model.training


def test_a_tokenizer_without_pad_token_is_enough(model, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with_pad = sample(model, tokenizer)
    tokenizer.pad_token = None
    samples = sample(model, tokenizer)
    np.testing.assert_allclose(samples.mean_logps, with_pad.mean_logps, atol=1e-6)


def test_no_prompts(model, tokenizer):
    samples = sample(model, tokenizer, [])
    assert samples.completions == []
    assert samples.mean_logps.shape == samples.lengths.shape == samples.truncated.shape == (0, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"prompts": ["1", ""]}, r"`prompts\[1\]` has no tokens"),
        ({"max_new_tokens": 10**6}, r"`prompts\[0\]` has 4 tokens; with `max_new_tokens=1000000` that exceeds"),
    ],
)
def test_bad_input_is_named(model, tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(model, tokenizer, **kwargs)


def test_a_broken_model_is_named(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="`model` returns NaN logits"):
        sample(model, tokenizer)


def test_prompts_sampled_in_parts_give_what_they_give_together(model, tokenizer):
    whole = sample(model, tokenizer, statistics=True)
    parts = [sample(model, tokenizer, PROMPTS[i : i + 2], first_prompt=i, statistics=True) for i in (0, 2, 4)]
    assert [row for part in parts for row in part.completions] == whole.completions
    np.testing.assert_allclose(np.concatenate([part.mean_logps for part in parts]), whole.mean_logps, atol=1e-5)
    for name in STATISTICS:
        together = np.concatenate([part.statistics[name] for part in parts])
        np.testing.assert_allclose(together, whole.statistics[name], atol=1e-5)
    assert sample(model, tokenizer, PROMPTS[:2], first_prompt=2).completions != whole.completions[:2]


def test_statistics_equal_those_of_an_unpadded_untempered_forward(model, tokenizer, monkeypatch):
    monkeypatch.setattr(sample_module, "TOP_K", 3)
    monkeypatch.setattr(sample_module, "GROUP", 4)
    samples = sample(model, tokenizer, temperature=0.7, statistics=True)
    plain = sample(model, tokenizer, temperature=0.7)
    assert_same(samples, plain, mean_logps=0)
    assert plain.statistics == {}
    checked = 0
    for p, prompt in enumerate(PROMPTS):
        for n, text in enumerate(samples.completions[p]):
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (not samples.truncated[p, n])
            if len(ids) != samples.lengths[p, n]:
                continue
            prompt_ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].double()
            probabilities = logits.softmax(-1).numpy()
            certainty = [-np.mean(np.log(len(row) * row)) for row in probabilities]
            confidence = [-np.mean(np.log(np.sort(row)[-3:])) for row in probabilities]
            groups = [np.mean(confidence[i : i + 4]) for i in range(max(1, len(ids) - 3))]
            expected = [np.mean(certainty), np.mean(confidence[-4:]), min(groups)]
            assert [samples.statistics[name][p, n] for name in STATISTICS] == pytest.approx(expected, abs=1e-4)
            checked += len(ids) > 4
    assert checked >= 5


def test_no_statistics_without_tokens():
    assert sequence_statistics(None, np.array([3])) == {}
