"""The cost model against values worked by hand and against torch's own counter of FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_capo.planning import cost


SMALL = dict(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
)


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}, {"head_dim": 16}], ids=["grouped", "plain", "wide heads"])
def model(request) -> Qwen2ForCausalLM:
    config = Qwen2Config(**{**SMALL, **request.param}, attn_implementation="eager", tie_word_embeddings=True)
    return Qwen2ForCausalLM(config)


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 16)])
def test_forward_and_backward_as_torch_counts_them(model, rows, length):
    shape = cost.shape_of(model.config)
    ids = torch.randint(50, (rows, length))
    with torch.no_grad():
        forward = counted(lambda: model(ids))
    assert forward == pytest.approx(cost.forward_flops(shape, rows, length), rel=2e-3)  # torch also counts rotations

    training = counted(lambda: model(ids).logits.sum().backward())
    assert training == pytest.approx(cost.training_flops(shape, rows, length), rel=2e-3)


def test_gradient_checkpointing_as_torch_counts_it():
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, attn_implementation="eager"))
    shape = cost.shape_of(model.config)
    model.gradient_checkpointing_enable()
    model.train()
    training = counted(lambda: model(torch.randint(50, (2, 16))).logits.sum().backward())
    # Not computed again: the head, and what comes last in a layer, whose output no gradient needs.
    saved = 2 * (2 * 16) * (32 * 50 + 3 * 80 * 32)
    assert training == pytest.approx(cost.training_flops(shape, 2, 16, True) - saved, rel=2e-3)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (cost.QWEN_1_5B, (28, 1536, 8960, 12, 2, 151936)),
        (cost.QWEN_7B, (28, 3584, 18944, 28, 4, 152064)),
        (cost.LLAMA_8B, (32, 4096, 14336, 32, 8, 128256)),
    ],
    ids=["1.5B", "7B", "8B"],
)
def test_weights_of_published_models(shape, sizes):
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    config = Qwen2Config(**dict(zip(names, sizes, strict=True)))
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert shape == cost.shape_of(config)
    assert shape.weights == products


def test_generation_is_a_token_at_a_time():
    """One row, two prompt tokens, three completion tokens: positions attend to 1, 2, 3, 4 and 5 tokens."""
    shape = cost.ModelShape(weights=100, layers=2, attention_width=8)
    expected = sum(2 * 100 + 4 * 2 * 8 * attended for attended in (1, 2, 3, 4, 5))
    assert cost.generation_flops(shape, 1, 2, 3) == expected
    assert cost.generation_flops(shape, 7, 2, 3) == 7 * expected


def test_a_step_by_hand():
    shape = cost.ModelShape(weights=1000, layers=1, attention_width=10)
    step = cost.step_cost(shape, rows=8, prompt_length=4, completion_length=6, padded_length=20, passes=2, share=0.25)
    row = 2 * 1000 * 20 + 4 * 10 * 20 * 20  # 56,000
    assert step.generated_tokens == 48 and step.passed_tokens == 80 and step.trained_tokens == 40
    assert (step.passes, step.training) == (2 * 2 * row, 2 * 4 * row)
    assert step.generation == 8 * (2 * 1000 * 10 + 4 * 10 * 55)
    assert step.flops == step.generation + step.passes + step.training
    both = cost.step_seconds(
        step, flops_per_second=1e3, training_utilisation=0.5, generation_utilisation=0.1, devices=2
    )
    assert both == pytest.approx(step.generation / 200 + (step.passes + step.training) / 1000)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5])
def test_shares_outside_their_range(bad):
    shape = cost.ModelShape(1, 1, 1)
    with pytest.raises(ValueError, match="share must lie in"):
        cost.step_cost(shape, rows=1, prompt_length=1, completion_length=1, share=bad)
    with pytest.raises(ValueError, match="utilisation must lie in"):
        cost.seconds(1.0, flops_per_second=1.0, utilisation=bad)
