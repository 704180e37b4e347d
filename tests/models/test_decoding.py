"""How a batch is decoded; its sampling law is tested in tests/trainer/test_generation.py and tests/evaluation."""

import warnings

import torch
from transformers import Qwen2ForCausalLM

from tests.helpers import tiny_qwen2
from trl_capo.models.decoding import decode


class BeforeTheRename(Qwen2ForCausalLM):
    """A forward as it was in transformers when the cache was called `past_key_values`."""

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


def greedy(model) -> list[list[int]]:
    tokens = torch.zeros(3, 6, dtype=torch.long)

    def choose(t, rows, logits):
        tokens[rows, t] = logits.argmax(-1)
        return tokens[rows, t], torch.zeros(len(rows), dtype=torch.bool)

    with torch.no_grad():
        decode(model, [[3, 4, 5], [7]], [0, 1, 1], 6, choose)
    return tokens.tolist()


def test_the_cache_goes_by_the_name_that_the_model_gives_it():
    model = tiny_qwen2()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a deprecated name would be swallowed once it is removed
        tokens = greedy(model)
    whole = torch.tensor([[7, *tokens[1][:-1]]])
    expected = model(whole).logits.argmax(-1)[0].tolist()
    assert tokens[1] == tokens[2] == expected  # a cache that is not read would show here
    old = BeforeTheRename(model.config)
    old.load_state_dict(model.state_dict())
    assert greedy(old) == tokens
