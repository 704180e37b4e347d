"""A real vLLM engine on the CPU, in an environment of its own: run by `make test-vllm`.

What a CPU cannot show: transfer of weights over NCCL, sleep mode, tensor parallelism, CUDA graphs, speed.
"""

import functools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import config_kwargs, parity_reward
from trl_capo import CAPOConfig, CAPOTrainer, cli
from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
from trl_capo.evaluation.samples import read_samples
from trl_capo.evaluation.sampling import TOP_K, sequence_statistics, token_statistics
from trl_capo.evaluation.vllm import load_vllm, sample_completions_vllm


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def prompts():
    return arithmetic_dataset("test_3", 12)["prompt"]


@pytest.fixture(scope="module")
def llm():
    return load_vllm(str(BASE_MODEL), dtype="float32", enforce_eager=True)


@torch.no_grad()
def reference_logits(samples, prompts, dtype):
    """(p, n), token ids and transformers' logits of each completion whose text gives back its tokens."""
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    for p, prompt in enumerate(prompts):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for n, text in enumerate(samples.completions[p]):
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (not samples.truncated[p, n])
            if len(ids) == samples.lengths[p, n]:  # a special token inside it is not in the text
                yield (p, n), ids, model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].float()


def reference_mean_logps(samples, prompts, dtype) -> dict[tuple[int, int], float]:
    return {
        at: logits.log_softmax(-1)[range(len(ids)), ids].mean().item()
        for at, ids, logits in reference_logits(samples, prompts, dtype)
    }


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_confidence_is_that_of_transformers(llm, prompts, temperature):
    samples = sample_completions_vllm(
        llm, prompts, num_samples=4, max_new_tokens=24, temperature=temperature, statistics=True
    )
    assert samples.truncated.any() and not samples.truncated.all()
    expected = reference_mean_logps(samples, prompts, torch.float32)
    assert len(expected) >= 40
    for at, value in expected.items():
        assert samples.mean_logps[at] == pytest.approx(value, abs=1e-5)
    for at, ids, logits in reference_logits(samples, prompts, torch.float32):
        assert logits.shape[1] > TOP_K
        expected = sequence_statistics(token_statistics(logits)[None].double().numpy(), np.array([len(ids)]))
        assert samples.statistics["tail_confidence"][at] == pytest.approx(expected["tail_confidence"][0], rel=1e-5)


def test_bfloat16_is_as_close_as_bfloat16_gets(prompts):
    """Within twice the distance of transformers' own bfloat16 from float32."""
    llm = load_vllm(str(BASE_MODEL), dtype="bfloat16", enforce_eager=True)
    samples = sample_completions_vllm(llm, prompts, num_samples=4, max_new_tokens=24)
    exact, rounded = (reference_mean_logps(samples, prompts, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = max(abs(samples.mean_logps[at] - exact[at]) for at in exact)
    theirs = max(abs(rounded[at] - exact[at]) for at in exact)
    assert 0 < ours < 2 * theirs < 0.1


def test_samples_depend_on_their_number_only(llm, prompts):
    whole = sample_completions_vllm(llm, prompts[:3], num_samples=3, max_new_tokens=40)
    last = sample_completions_vllm(llm, prompts[2:3], num_samples=3, max_new_tokens=40, first_prompt=2)
    assert last.completions[0] == whole.completions[2]
    assert len({text for row in whole.completions for text in row}) > 3


def test_evaluate_with_both_engines(tmp_path, capsys):
    """Two engines, one model: the same accuracy and AUC within what chance allows."""
    found = {}
    for engine in ("vllm", "transformers"):
        folder = tmp_path / engine
        command = ["evaluate", "arithmetic-base", "--benchmark", "arithmetic_test_2", "--num_prompts", "150"]
        assert cli.main([*command, "--num_samples", "8", "--engine", engine, "--output_dir", str(folder)]) == 0
        [found[engine]] = read_samples(folder / "arithmetic-base")
        assert json.loads((folder / "arithmetic-base" / "summary.json").read_text())["benchmarks"]
    ours, theirs = found["vllm"], found["transformers"]
    spread = np.hypot(*(of.correct.mean(axis=1).std() / np.sqrt(len(of.correct)) for of in (ours, theirs)))
    assert abs(ours.correct.mean() - theirs.correct.mean()) < 4 * spread
    means = [of.mean_logps.mean(axis=1) for of in (ours, theirs)]
    assert abs(means[0].mean() - means[1].mean()) < 4 * np.hypot(*(m.std() / np.sqrt(len(m)) for m in means))


def test_one_engine_after_the_other(tmp_path):
    """Two models in one call: the first engine is gone before the second comes."""
    command = [
        "evaluate",
        "arithmetic-base",
        "arithmetic-flat",
        "--benchmark",
        "arithmetic_test_2",
        "--engine",
        "vllm",
    ]
    assert cli.main([*command, "--num_prompts", "4", "--num_samples", "2", "--output_dir", str(tmp_path)]) == 0
    base, flat = (read_samples(tmp_path / f"arithmetic-{name}")[0] for name in ("base", "flat"))
    assert base.correct.shape == flat.correct.shape == (4, 2)
    assert flat.mean_logps.mean() < base.mean_logps.mean() - 0.1


def untied(folder) -> str:
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("mean_logps_from", "tied"), [("policy", True), ("sampler", False)])
def test_capo_trains_with_a_colocated_engine(tmp_path, monkeypatch, tied, mean_logps_from):
    """Weights move and reach the engine: it gives its samples the log-probs that the policy gives them."""
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    # On a CPU vLLM packs weights for oneDNN and cannot load others into them: keep them as they are.
    monkeypatch.setattr(
        utils,
        "dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear),
    )
    exact = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    monkeypatch.setattr(vllm_generation, "LLM", exact)
    model = str(BASE_MODEL) if tied else untied(tmp_path / "untied")
    options = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128, max_steps=3, learning_rate=3e-3)
    options |= dict(max_completion_length=24, mean_logps_from=mean_logps_from, ref_ppl_mask=False, tau=0.25)
    trainer = CAPOTrainer(
        model,
        parity_reward,
        CAPOConfig(**config_kwargs(tmp_path / "run", **options)),
        arithmetic_dataset("train", 64),
    )
    [prompt] = arithmetic_dataset("test_3", 1)["prompt"]
    ids = torch.tensor([trainer.processing_class.apply_chat_template(prompt, return_dict=True)["input_ids"]])
    before = trainer.model(ids).logits.detach()
    trainer.train()
    assert (trainer.model(ids).logits - before).abs().max() > 0.1
    steps = [entry for entry in trainer.state.log_history if "sampling/sampling_logp_difference/max" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3
    assert any(entry["capo/auc_within"] is not None for entry in steps)
