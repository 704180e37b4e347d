"""`generation="compact"`: the same sampling law as TRL's `generate`, and what it refuses."""

import copy
from collections import Counter
from itertools import product

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
)
from trl import GRPOConfig

from tests.helpers import (
    config_kwargs,
    count_forwards,
    largest_change,
    parameters,
    parity_reward,
    prompt_dataset,
    tiny_trainer,
)
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.errors import UserError
from trl_capo.models import decoding
from trl_capo.preflight.generation import check_decodable, check_generation
from trl_capo.trainer import generation
from trl_capo.trainer.config import FastGRPOConfig
from trl_capo.trainer.fast_step import FastGRPOTrainer


SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None)
PROMPTS = [[3, 4, 5]] * 5 + [[6]] * 5 + [[7, 8, 9, 10, 11]] * 5


def make(model, folder, build=None, **options):
    options = {"generation": "compact", **options}
    config = FastGRPOConfig(**config_kwargs(folder / options["generation"], **options))
    return FastGRPOTrainer(
        model, parity_reward, config, prompt_dataset(), eval_dataset=prompt_dataset(4), **build or {}
    )


def generate(trainer, prompts=PROMPTS, seed=0) -> list[list[int]]:
    torch.manual_seed(seed)
    completions, logps = trainer._generate_single_turn([list(ids) for ids in prompts], None, {}, 5)
    assert logps is None
    return completions


@pytest.fixture
def whole_batch(monkeypatch):
    """Finished rows stay, so that each row gets the random numbers that it gets from `generate`."""
    monkeypatch.setattr(decoding, "_SHRINK_AT", 2)


# The law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7),
        dict(top_p=0.8, temperature=1.3),
        dict(top_k=4),
        dict(min_p=0.1),
        dict(repetition_penalty=1.5),
        dict(generation_kwargs={"no_repeat_ngram_size": 2, "suppress_tokens": [1]}),
        dict(generation_kwargs={"min_new_tokens": 3}),
        dict(pad_to_multiple_of=8),
        dict(gradient_checkpointing=True),
        dict(max_completion_length=1),
    ],
    ids=str,
)
def test_rows_are_those_of_generate_while_none_has_left(tiny_model, tmp_path, whole_batch, options):
    rows = [generate(make(tiny_model, tmp_path, generation=kind, **options)) for kind in ("trl", "compact")]
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows[0]}) > 5


@pytest.mark.parametrize("kind", ["attention", "adapter", "new adapter", "adapter without dropout", "evaluation"])
def test_dropout_is_as_in_generate(tiny_model, tmp_path, whole_batch, kind):
    results = []
    for which in ("trl", "compact"):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model, attention_dropout=0.3 if kind in ("attention", "evaluation") else 0.0
        )
        dropout = 0.3 if kind in ("adapter", "new adapter") else 0.0
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
        build = {"peft_config": adapter} if "adapter" in kind else {}
        torch.manual_seed(0)  # the adapter's weights
        trainer = make(model, tmp_path, build, generation=which)
        if kind != "new adapter":  # which is in training mode while the model around it is not
            trainer.model.train(kind != "evaluation")
        results.append(generate(trainer))
        assert trainer.model.training is (kind != "evaluation")
        assert generation.has_dropout(trainer.model) is (kind in ("attention", "adapter", "new adapter"))
    assert results[0] == results[1]


def tiny_vocabulary_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=4, initializer_range=0.3, **SIZES, **IDS))


def law(model, prompt: list[int], eos: set[int], temperature: float, length: int) -> dict[tuple[int, ...], float]:
    """The probability of each completion, by forwards of single sequences."""
    probabilities = {}
    with torch.no_grad():
        for tokens in product(range(4), repeat=length):
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), length)
            if tokens[:end] in probabilities:
                continue
            logits = model(torch.tensor([prompt + list(tokens[:end])])).logits[0].double() / temperature
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            probabilities[tokens[:end]] = logps[range(end), tokens[:end]].sum().exp().item()
    return probabilities


@pytest.mark.parametrize("kind", ["trl", "compact"])
@pytest.mark.parametrize(("temperature", "eos"), [(1.0, [1]), (0.7, [1, 2])])
def test_completions_follow_the_law(tokenizer, tmp_path, kind, temperature, eos):
    model = tiny_vocabulary_model()
    model.generation_config.eos_token_id = eos
    build = {"processing_class": tokenizer}
    trainer = make(model, tmp_path, build, generation=kind, temperature=temperature, max_completion_length=3)
    prompts = [[2, 3, 3, 2], [3], [2, 2]]
    num_rows = 3000
    rows = generate(trainer, [prompt for prompt in prompts for _ in range(num_rows)])
    for i, prompt in enumerate(prompts):
        counts = Counter(map(tuple, rows[i * num_rows : (i + 1) * num_rows]))
        expected = law(trainer.model.eval(), prompt, set(eos), temperature, 3)
        assert sum(expected.values()) == pytest.approx(1)
        assert counts.keys() <= expected.keys()
        common = [row for row, p in expected.items() if p * num_rows >= 5]
        observed = [*(counts[row] for row in common), num_rows - sum(counts[row] for row in common)]
        of_common = sum(expected[row] for row in common)
        frequencies = [num_rows * p for p in (*(expected[row] for row in common), 1 - of_common)]
        assert len(common) >= 8
        assert chisquare(observed, frequencies).pvalue > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=lambda config: config.model_type,
)
def test_rows_are_drawn_from_the_logits_of_a_full_forward(tokenizer, tmp_path, monkeypatch, config):
    config.update({"vocab_size": 17, **IDS})
    torch.manual_seed(0)
    model, build = AutoModelForCausalLM.from_config(config), {"processing_class": tokenizer}
    trainer = make(model, tmp_path, build, max_completion_length=16)
    seen, batches = {}, []

    def recording(model, prompt_ids, prompt_of_row, max_new_tokens, choose, goes_on):
        def record(t, rows, logits):
            batches.append(len(rows))
            seen.update({(row, t): logits[i] for i, row in enumerate(rows.tolist())})
            return choose(t, rows, logits)

        return decoding.decode(model, prompt_ids, prompt_of_row, max_new_tokens, record, goes_on)

    monkeypatch.setattr(generation, "decode", recording)
    completions = generate(trainer)
    assert batches[-1] < batches[0] == len(PROMPTS)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        used = torch.stack([seen[row, t] for t in range(len(completion))])
        torch.testing.assert_close(used, logits, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_read_once_and_finished_rows_are_not_computed(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, max_completion_length=32)
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    completions = generate(trainer)
    assert shapes[0] == (3, 5)
    assert sum(rows for rows, _ in shapes[1:]) < 1.3 * sum(map(len, completions))
    assert all(width == 1 for _, width in shapes[1:])


def test_a_turn_after_a_tool_has_other_rows(tiny_model, tmp_path, whole_batch):
    """TRL then asks for one completion of each of some longer histories."""
    histories = [[3, 4, 5, 6, 7], [3, 4], [9] * 12]
    rows = [generate(make(tiny_model, tmp_path, generation=kind), histories) for kind in ("trl", "compact")]
    assert rows[0] == rows[1]


# Training ------------------------------------------------------------------------------------------------------------


def test_training_and_evaluation(tiny_model, tmp_path, monkeypatch):
    calls = []
    original = generation.decode_compactly
    monkeypatch.setattr(
        generation,
        "decode_compactly",
        lambda model, *args, **kwargs: calls.append(model.training) or original(model, *args, **kwargs),
    )
    options = dict(max_steps=3, eval_strategy="steps", eval_steps=3, generation="compact", learning_rate=0.01)
    trainer = CAPOTrainer(
        tiny_model,
        parity_reward,
        CAPOConfig(**config_kwargs(tmp_path, **options)),
        prompt_dataset(),
        eval_dataset=prompt_dataset(4),
    )
    before = parameters(trainer)
    trainer.train()
    assert calls == [True, True, True, False, False]
    assert any(not torch.equal(before[name], value) for name, value in parameters(trainer).items())
    assert "generate" not in vars(trainer.model)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_log_probs_are_the_policys(tiny_model, tmp_path, temperature):
    """So scores come without a pass, and a run is the one that is scored by the policy."""
    options = dict(generation="compact", optim="sgd", learning_rate=0.1, max_steps=4, temperature=temperature)
    runs, seen = {}, {"policy": [], "sampler": []}
    for scored_by in ("policy", "sampler"):

        class Recording(CAPOTrainer):
            def _compute_advantages(self, groups, seen=seen[scored_by]):
                seen.append(groups)
                return super()._compute_advantages(groups)

        runs[scored_by] = tiny_trainer(
            Recording, tiny_model, tmp_path / scored_by, mean_logps_from=scored_by, **options
        )
        forwards = count_forwards(runs[scored_by].model)
        runs[scored_by].train()
        runs[scored_by].forwards = len(forwards)
    for policy, sampler in zip(seen["policy"], seen["sampler"], strict=True):
        scored = policy.mean_logps.isfinite()
        assert torch.equal(policy.correct, sampler.correct)
        torch.testing.assert_close(sampler.mean_logps[scored], policy.mean_logps[scored], atol=1e-4, rtol=0)
    assert any(groups.mean_logps.isfinite().any() for groups in seen["policy"])
    assert largest_change(parameters(runs["policy"]), parameters(runs["sampler"])) <= 1e-4
    assert runs["sampler"].forwards < runs["policy"].forwards


def test_scores_with_dropout_are_refused(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.1)
    options = dict(generation="compact", mean_logps_from="sampler")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = tiny_trainer(CAPOTrainer, model, tmp_path, processing_class=tokenizer, **options)
    with pytest.raises(UserError, match="by log-probs with dropout, which are noisy"):
        trainer.train()


def test_a_resumed_run_is_the_whole_one(tiny_model, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=0.01)
    whole = make(tiny_model, tmp_path / "whole", **options)
    whole.train()
    torch.manual_seed(123)
    resumed = make(tiny_model, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "compact" / "checkpoint-4"))
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name


@pytest.mark.parametrize("patched", [False, True])
def test_generate_is_put_back(tiny_model, patched):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if patched:
        model.generate = patch = lambda **kwargs: None
    with pytest.raises(RuntimeError, match="stopped"):
        with generation.generating_by(generation.decode_compactly, model):
            assert model.generate.keywords == {"custom_generate": generation.decode_compactly}
            raise RuntimeError("stopped")
    assert model.generate is patch if patched else "generate" not in vars(model)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "has_rollout_func", "message"),
    [
        (dict(use_vllm=True), False, "not used with use_vllm=True. Set generation='trl'"),
        (dict(use_transformers_continuous_batching=True), False, "not used with use_transformers_continuous_batching"),
        (dict(), True, "not used with a rollout_func"),
        (dict(cache_implementation="static"), False, "cache_implementation='static' does not"),
        (dict(generation_kwargs={"cache_implementation": "static"}), False, "cache_implementation='static' does not"),
        (dict(generation_kwargs={"num_beams": 2}), False, "ask for beam sample"),
        (dict(generation_kwargs={"do_sample": False}), False, "ask for greedy search"),
        (dict(generation_kwargs={"guidance_scale": 1.5}), False, "does not work with guidance_scale"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, has_rollout_func, message):
    check_generation(FastGRPOConfig(**config_kwargs(tmp_path, **options)), has_rollout_func)
    with pytest.raises(UserError, match=message):
        check_generation(FastGRPOConfig(**config_kwargs(tmp_path, generation="compact", **options)), has_rollout_func)


def test_a_trainer_refuses_them(tiny_model, tmp_path):
    options = dict(generation="compact", cache_implementation="static")
    with pytest.raises(UserError, match="cache_implementation='static'"):
        make(tiny_model, tmp_path, **options)
    config = GroupAdvantageConfig(**config_kwargs(tmp_path, **options))
    with pytest.raises(UserError, match="cache_implementation='static'"):  # before it loads a model
        GroupAdvantageTrainer("no/such-model", parity_reward, config, prompt_dataset())


def test_options_that_fit_are_not_refused(tmp_path):
    check_generation(GRPOConfig(**config_kwargs(tmp_path)), has_rollout_func=True)
    options = dict(generation="compact", generation_kwargs={"top_k": 3}, cache_implementation="dynamic")
    check_generation(FastGRPOConfig(**config_kwargs(tmp_path, **options)), has_rollout_func=False)


def test_another_value_is_refused(tmp_path):
    with pytest.raises(UserError, match="generation must be one of trl, compact, got 'fast'"):
        FastGRPOConfig(**config_kwargs(tmp_path, generation="fast"))


def test_what_the_models_generation_config_asks_for_is_refused_too(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.num_beams = 2
    with pytest.raises(UserError, match="the model's generation config ask for beam sample"):
        generate(make(model, tmp_path))


def small(config_class, **options):
    return AutoModelForCausalLM.from_config(config_class(vocab_size=17, **options))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: small(BloomConfig, hidden_size=16, n_layer=1, n_head=2),
            "BloomForCausalLM, which takes no position_ids",
        ),
        (lambda: small(MambaConfig, hidden_size=16, num_hidden_layers=1), "MambaForCausalLM"),
        (
            lambda: small(Qwen3NextConfig, **SIZES, num_experts=2, moe_intermediate_size=8),
            "Qwen3NextForCausalLM: rows cannot be removed from the cache of a recurrent",
        ),
    ],
)
def test_models_that_cannot_drop_rows_are_refused(build, message):
    with pytest.raises(UserError, match=f"generation='compact' does not work with {message}"):
        check_decodable(build())


def test_adapters_that_come_before_the_prompt_are_refused(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    check_decodable(get_peft_model(copy.deepcopy(model), LoraConfig(r=2)))
    prefix = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="depends on the prompt .PrefixTuningConfig."):
        check_decodable(prefix)
    with pytest.raises(UserError, match="an image model"):
        check_decodable(model, reads_images=True)
