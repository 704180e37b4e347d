"""What the fast step cannot do exactly it does not do, and it says so in one line."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from tests.helpers import TINY, VOCABULARY
from tests.trainer.runs import PAPER, RecordingStock, RecordingTrainer, assert_equal_runs, train


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture
def mixture_of_experts():
    torch.manual_seed(0)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_hidden_layers=1, **experts))


@pytest.fixture
def learned_positions():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=4, n_positions=64, initializer_range=0.5)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, eos_token_id=1, pad_token_id=0, bos_token_id=None))


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_mixture_of_experts(make, mixture_of_experts, capsys, coefficient):
    options = dict(loss_type="grpo", router_aux_loss_coef=coefficient, model=mixture_of_experts, **PAPER)
    expected, actual = make(RecordingStock, **options), make(RecordingTrainer, **options)
    assert ("only trimmed, because the experts' auxiliary loss" in capsys.readouterr().out) == (coefficient > 0)
    assert_equal_runs(expected, actual)
    rows = [sum(len(batch["completion_ids"]) for batch in trainer.seen) for trainer in (expected, actual)]
    assert (rows[0] == rows[1]) == (coefficient > 0)


def test_learned_positions_leave_batches_alone(make, learned_positions, capsys):
    options = dict(loss_type="grpo", model=learned_positions, **PAPER)
    expected, actual = make(RecordingStock, **options), make(RecordingTrainer, **options)
    line = "repack: batches are left as TRL makes them, because the model's positions depend on padding."
    assert capsys.readouterr().out.count(line) == 1
    assert_equal_runs(expected, actual, tolerance=0.0)
    for stock, ours in zip(expected.seen, actual.seen, strict=True):
        assert all(torch.equal(stock[name], ours[name]) for name in ("prompt_ids", "completion_ids", "advantages"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, None),
        ({"repack": False, "beta": 0.1}, None),
        ({"beta": 0.1}, "repack: rows are sorted and trimmed but not dropped, because rows without advantage still"),
        ({"loss_type": "bnpo"}, "repack: rows are only trimmed, because loss_type='bnpo' depends on which rows share"),
        ({"top_entropy_quantile": 0.5}, "repack: rows are only trimmed, because top_entropy_quantile depends on"),
        ({"entropy_coef": 0.1}, "repack: rows are only trimmed, because the entropy bonus depends on"),
        ({"use_adaptive_entropy": True}, "repack: rows are only trimmed, because the entropy bonus depends on"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_line_says_what_is_not_done(make, capsys, options, line):
    trainer = make(RecordingTrainer, max_steps=1, **options)
    out = capsys.readouterr().out
    assert out.count("repack:") == (line is not None) and (line or "") in out
    train(trainer)
    assert "repack:" not in capsys.readouterr().out
    num_rows = sum(len(batch["completion_ids"]) for batch in trainer.seen)
    assert (num_rows == 8) == bool(options), "rows are dropped where nothing is said, and only there"
