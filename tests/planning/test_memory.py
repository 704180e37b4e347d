"""The memory estimate against tensors that exist."""

import pytest
import torch
from peft import LoraConfig
from torch.nn import Linear, ModuleList, Sequential

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer
from trl_capo.planning.dry_run import estimate, make_parser, read_launch
from trl_capo.planning.memory import activation_bytes, largest_layer, memory


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ref_ppl_mask": False},
        {"ref_model_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd"},
        {"use_peft": True},
        {"use_peft": True, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_weights_gradients_optimizer_and_reference_are_exact(tiny_model, tmp_path, options):
    from trl import ModelConfig, get_peft_config

    lora = dict(lora_r=4, lora_target_modules=["q_proj", "v_proj"]) if options.get("use_peft") else {}
    model_args = ModelConfig(dtype=options.get("dtype", "float32"), use_peft=options.get("use_peft", False), **lora)
    training = {name: value for name, value in options.items() if name not in ("dtype", "use_peft")}
    kwargs = config_kwargs(tmp_path, model_init_kwargs={"dtype": model_args.dtype}, **training)
    args = CAPOConfig(**kwargs)
    expected, _ = estimate(CAPOTrainer, args, model_args, tiny_model, (1, "none"), 0, tokens=16)

    found = {}

    class Weighing(CAPOTrainer):
        def training_step(self, model, inputs, *rest):
            loss = super().training_step(model, inputs, *rest)
            found["gradients"] = tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
            return loss

    trainer = Weighing(tiny_model, parity_reward, args, prompt_dataset(), peft_config=get_peft_config(model_args))
    trainer.train()
    state = [value for of in trainer.optimizer.state.values() for value in of.values() if torch.is_tensor(value)]
    found["parameters"] = tensor_bytes(trainer.model.parameters())
    found["optimizer"] = tensor_bytes(state)
    found["reference"] = 0 if trainer.ref_model is None else tensor_bytes(trainer.ref_model.parameters())
    assert found == {name: getattr(expected, name) for name in found}
    assert (found["reference"] > 0) == (options.get("ref_ppl_mask", True) and "use_peft" not in options)


def tiny(dtype=torch.float32):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, **shape)).to(dtype)


@pytest.mark.parametrize(
    ("sharding", "shares"),  # of weights, gradients, optimizer and reference, on each of 4 GPUs
    [
        ("ddp", (1, 2, 1, 1)),
        ("fsdp2", (1 / 4, 1 / 4, 1 / 4, 1 / 4)),
        ("zero2", (1 / 2, 1 / 8, 12 / 8 / 4, 1 / 2)),
        ("zero3", (1 / 8, 1 / 8, 12 / 8 / 4, 1 / 8)),
    ],
)
def test_sharding(sharding, shares):
    model = tiny()
    weights = tensor_bytes(model.parameters())
    found = memory(model, reference=model, sharding=sharding, num_processes=4)
    sizes = (weights, weights, 2 * weights, weights)
    for share, size, name in zip(shares, sizes, ("parameters", "gradients", "optimizer", "reference"), strict=True):
        assert getattr(found, name) == pytest.approx(share * size, rel=0.01), name
    assert (found.gathered > 0) == (sharding in ("fsdp2", "zero3"))
    assert found.total == sum(vars(found).values())
    with pytest.raises(ValueError, match="sharding must be one of none, ddp"):
        memory(model, sharding="zero1")


def saved_bytes(model, rows, tokens, checkpointing):
    """What autograd really keeps for the backward pass of the layers, the head left out."""
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in {p.data_ptr() for p in model.parameters()}:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.randint(64, (rows, tokens)), use_cache=False)
    return sum(kept.values())


def test_activations_grow_as_they_do():
    """Not exact, and on a CPU: within a third of what autograd keeps, and with the same savings by checkpointing."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=4, **shape)).train()
    head = 4 * 2 * 96 * 64 + 4 * 64 * 128
    whole = activation_bytes(model.config, 2, 96, 4, 4, checkpointing=False, unfused_head=False) - head
    assert whole == pytest.approx(saved_bytes(model, 2, 96, checkpointing=False), rel=0.34)
    one_layer = whole // 6
    checkpointed = (
        activation_bytes(model.config, 2, 96, 4, 4, checkpointing=True, unfused_head=False) - head - one_layer
    )
    assert checkpointed == pytest.approx(saved_bytes(model, 2, 96, checkpointing=True), rel=0.34)


def test_all_logits_cost_what_simko_says():
    config = tiny().config
    config.vocab_size = 152_000
    plain, unfused = (activation_bytes(config, 8, 3072, 2, 4, True, unfused_head) for unfused_head in (False, True))
    assert unfused - plain > 2 * 15e9 - 1e9  # 15 GB, twice


def test_largest_layer():
    assert largest_layer(Sequential(ModuleList([Sequential(Linear(3, 3), Linear(3, 3))]), Linear(2, 2))) == 24


@pytest.mark.parametrize(
    ("name", "launch"),
    [("ddp", (8, "ddp")), ("fsdp2", (8, "fsdp2")), ("zero2", (8, "zero2")), ("zero3", (8, "zero3"))],
)
def test_launches_are_read(repository, name, launch):
    assert read_launch(str(repository / "recipes" / "accelerate_configs" / f"{name}.yaml")) == launch


def test_unknown_launches_are_named(tmp_path):
    path = tmp_path / "tpu.yaml"
    path.write_text("distributed_type: TPU\nnum_processes: 8\n")
    with pytest.raises(ValueError, match="a dry run does not know distributed_type 'TPU'"):
        read_launch(str(path))
    assert read_launch(None) == (1, "none")
    options, rest = make_parser().parse_known_args(["--dry-run", "--gpu_memory", "24", "--tau", "0.5"])
    assert options.dry_run and options.gpu_memory == 24 and rest == ["--tau", "0.5"]


def test_lora_trains_little():
    from peft import get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    found = memory(model)
    assert found.gradients == 4 * 2 * (2 * 16 + 2 * 16) and found.parameters > 10 * found.gradients
