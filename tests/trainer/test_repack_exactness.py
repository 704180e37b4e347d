"""Which steps of repacking are exact under which settings, and for which models padding matters."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_capo.trainer.repack import Repacking, positions_depend_on_padding, what_is_exact


PLAIN = dict(
    loss_type="grpo",
    beta=0.0,
    top_entropy_quantile=1.0,
    entropy_bonus=False,
    aux_loss=False,
    is_vlm=False,
    padding_matters=False,
)


@pytest.mark.parametrize(
    ("changes", "steps", "reason"),
    [
        ({}, (True, True, True), ""),
        *[({"loss_type": name}, (True, True, True), "") for name in ("dapo", "cispo", "vespo")],
        *[({"loss_type": name}, (True, True, True), "") for name in ("grpo", "sapo", "luspo", "dr_grpo")],
        ({"beta": 0.1}, (True, True, False), "KL term"),
        ({"beta": -0.1}, (True, True, False), "KL term"),
        ({"loss_type": "bnpo"}, (True, False, False), "loss_type='bnpo'"),
        ({"loss_type": "new_in_trl"}, (True, False, False), "loss_type='new_in_trl'"),
        ({"top_entropy_quantile": 0.2}, (True, False, False), "top_entropy_quantile"),
        ({"entropy_bonus": True, "beta": 0.1}, (True, False, False), "entropy bonus"),
        ({"aux_loss": True}, (True, False, False), "experts"),
        ({"padding_matters": True, "beta": 0.1}, (False, False, False), "padding"),
        ({"is_vlm": True, "loss_type": "bnpo"}, (False, False, False), "images"),
    ],
    ids=lambda value: "-".join(map(str, sum(value.items(), ()))) if isinstance(value, dict) else "",
)
def test_what_is_exact(changes, steps, reason):
    repacking = what_is_exact(**{**PLAIN, **changes})
    assert (repacking.trim, repacking.sort, repacking.prune) == steps
    assert reason in repacking.reason and bool(repacking.reason) == (steps != (True, True, True))
    assert isinstance(repacking, Repacking)


SIZES = dict(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT_SIZES = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=64)
BART_SIZES = dict(
    vocab_size=32,
    d_model=16,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LLAMA_4_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ARCHITECTURES = {
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES),
    "llama": ("LlamaConfig", SIZES),
    "sliding window": ("MistralConfig", SIZES | {"sliding_window": 4}),
    "rope of each layer type": ("Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 4}),
    "experts": ("Qwen3MoeConfig", SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "alibi": ("BloomConfig", dict(vocab_size=32, hidden_size=16, n_layer=2, n_head=4)),
    "linear attention": (
        "Qwen3NextConfig",
        SIZES
        | dict(
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "yarn": (
        "LlamaConfig",
        SIZES
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "dynamic": ("LlamaConfig", SIZES | {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "longrope": (
        "Phi3Config",
        SIZES
        | {
            "max_position_embeddings": 32,
            "original_max_position_embeddings": 11,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 11,
            },
        },
    ),
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gpt neo": (
        "GPTNeoConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            intermediate_size=32,
        ),
    ),
    "starcoder": ("GPTBigCodeConfig", GPT_SIZES),
    # Positions from the mask: the padding does not matter, though there is a table of them.
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
    ),
    # Absolute positions under other names, or with a table longer than the context.
    "dynamic of each layer type": (
        "Gemma3TextConfig",
        SIZES
        | {
            "head_dim": 16,
            "sliding_window": 4,
            "max_position_embeddings": 8,
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC},
        },
    ),
    "ministral 3": ("Ministral3Config", SIZES | {"head_dim": 16, "rope_parameters": LLAMA_4_SCALING}),
    "llama 4": (
        "Llama4TextConfig",
        SIZES
        | dict(
            head_dim=16,
            intermediate_size_mlp=32,
            num_local_experts=2,
            attention_chunk_size=64,
            floor_scale=4,
            attn_scale=1.0,
            attn_temperature_tuning=True,
            no_rope_layers=[1, 0],
        ),
    ),
    "gpt": ("OpenAIGPTConfig", GPT_SIZES),
    "xglm": (
        "XGLMConfig",
        dict(
            vocab_size=32,
            d_model=16,
            ffn_dim=32,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
        ),
    ),
    "biogpt": (
        "BioGptConfig",
        dict(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
    "bart": ("BartConfig", BART_SIZES),
    # A recurrent state that padding on the left changes.
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        SIZES | dict(lru_width=64, attention_window_size=32, block_types=["recurrent", "attention"]),
    ),
}


def tiny_random_model(architecture: str, seed: int = 0):
    name, sizes = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**sizes, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # as initialized, many positions would hardly matter
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


def change_by_padding(model) -> float:
    """How far log-probs move when padding is added on both sides of a sequence."""
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (1, 10))
    padded = torch.nn.functional.pad(ids, (5, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 3))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        actual = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 5:15]
    return (expected.log_softmax(dim=-1) - actual.log_softmax(dim=-1)).abs().max().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_whose_log_probs_depend_on_padding_are_known(architecture):
    model = tiny_random_model(architecture)
    change = change_by_padding(model)
    # Rounding moves log-probs by up to 1e-5, more on one processor than on another; positions that are read, by 0.04
    # and more.
    assert change < 1e-3 or change > 1e-2, "neither rounding nor clearly positions"
    assert positions_depend_on_padding(model) or change < 1e-3


@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3", "llama", "sliding window", "rope of each layer type", "experts", "yarn"]
)
def test_common_models_are_trimmed(architecture):
    assert not positions_depend_on_padding(tiny_random_model(architecture))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "wpe"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]},
    ],
    ids=["attention", "positions", "positions trained in full"],
)
def test_learned_positions_are_known_under_an_adapter(options):
    model = get_peft_model(
        tiny_random_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **options)
    )
    assert change_by_padding(model) > 1e-3 and positions_depend_on_padding(model)
