"""Building the base models of the arithmetic world."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_capo.data.arithmetic import FLAT_MODEL, arithmetic_tokenizer
from trl_capo.scripts.arithmetic_base import main
from trl_capo.worlds.arithmetic_base import SHARPNESS, make_batch


def test_batch_puts_the_loss_on_the_answer():
    tokenizer = arithmetic_tokenizer()
    batch = make_batch(tokenizer, [("1+2=", "1+2=3;"), ("1+2+3=", "1+2=3;3+3=6;")])
    labels = [[token for token in row if token != -100] for row in batch["labels"].tolist()]
    assert [tokenizer.decode(row) for row in labels] == ["1+2=3;<eos>", "1+2=3;3+3=6;<eos>"]


@pytest.mark.parametrize("world", list(SHARPNESS))
def test_training_command(tmp_path, capsys, world):
    arguments = f"--world {world} --clean_steps 2 --human_steps 2 --batch_size 4 --num_eval_prompts 2".split()
    states = []
    for name in ("first", "second"):
        main(["--output_dir", str(tmp_path / name), *arguments])
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    before = 1.0
    if world == "misconceptions":  # continues from the flat base, sharp again
        flat = AutoModelForCausalLM.from_pretrained(FLAT_MODEL).state_dict()
        before = flat["model.norm.weight"].mean().item() / SHARPNESS["flat"]
        assert not torch.equal(states[0]["model.embed_tokens.weight"], flat["model.embed_tokens.weight"])
    sharpness = states[0]["model.norm.weight"].mean().item()  # a few steps have hardly moved it
    assert sharpness == pytest.approx(before * SHARPNESS[world], rel=0.05)
    assert "test_5" in capsys.readouterr().out
