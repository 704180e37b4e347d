"""A run whose advantages stay 0 says so once."""

import pytest

from tests.helpers import config_kwargs, prompt_dataset, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageConfig
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.idle import IdleWatch


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (0.0, "all right for 0% and all wrong for 100% of the prompts. Choose easier prompts"),
        (1.0, "all right for 100% and all wrong for 0% of the prompts. Choose harder prompts"),
        (None, "all right for 0% and all wrong for 0% of the prompts. Check capo/frac_mixed"),
    ],
)
def test_capo_without_a_mixed_group(tiny_model, tmp_path, capsys, monkeypatch, reward, told):
    monkeypatch.setattr(IdleWatch, "patience", 3)
    monkeypatch.setattr("trl_capo.trainer.group_advantage.IdleWatch", lambda: IdleWatch(patience=3))

    def constant(completions, **kwargs):
        return [reward] * len(completions)

    options = dict(ref_ppl_mask=False, max_completion_length=2, max_steps=7)
    tiny_trainer(CAPOTrainer, tiny_model, tmp_path, constant, **options).train()
    printed = capsys.readouterr().out
    assert printed.count("Nothing was learnt in the last 3 generations") == 1 and told in printed


@pytest.mark.parametrize(
    ("num_rewards", "told"),
    [(1, "all wrong for 100% of the prompts. Choose easier prompts"), (2, "was 0. Check the means and deviations")],
)
def test_trls_own_advantages_with_and_without_a_label(tiny_model, tmp_path, capsys, monkeypatch, num_rewards, told):
    monkeypatch.setattr("trl_capo.trainer.group_advantage.IdleWatch", lambda: IdleWatch(patience=3))

    def constant(completions, **kwargs):
        return [0.0] * len(completions)

    def second(completions, **kwargs):
        return [0.0] * len(completions)

    args = GroupAdvantageConfig(**config_kwargs(tmp_path, max_completion_length=2, max_steps=4))
    GRPO(tiny_model, [constant, second][:num_rewards], args, prompt_dataset()).train()
    printed = capsys.readouterr().out
    assert printed.count("Nothing was learnt in the last 3 generations") == 1 and told in printed


def test_one_generation_that_teaches_starts_the_count_again():
    watch = IdleWatch(patience=2)
    lines = [watch.update(learns, 0.0, 0.5) for learns in (False, True, False, True, False, False, False, False)]
    assert [line is not None for line in lines] == [False] * 5 + [True, False, False]
