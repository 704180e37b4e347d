"""The metric that chooses the best checkpoint: known, meaningful and in the right direction, before training."""

import functools

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import GRPOConfig

from tests.helpers import config_kwargs, length_reward, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageTrainer
from trl_capo.errors import UserError
from trl_capo.preflight.best_metric import known_metrics, may_log_metrics
from trl_capo.rewards import accuracy_reward


BEST = dict(save_strategy="steps", save_steps=1, load_best_model_at_end=True)


def config(folder, kind=CAPOConfig, **options):
    mask = {} if kind is GRPOConfig else {"ref_ppl_mask": False}
    every_step = dict(eval_strategy="steps", eval_steps=1)
    return kind(**config_kwargs(folder, **{**mask, **every_step, **options}))


def logging_reward(completion_ids, log_metric, **kwargs):
    log_metric("my_metric", 1.0)
    return parity_reward(completion_ids)


def make(folder, kind=CAPOTrainer, reward=parity_reward, sets=None, callbacks=None, **options):
    args = config(folder, GRPOConfig if kind is GroupAdvantageTrainer else CAPOConfig, **options)
    rows = sets or prompt_dataset(8)
    return kind("/no/such/model", reward, args, prompt_dataset(), rows, callbacks=callbacks)


TWO = {"a": prompt_dataset(4), "b": prompt_dataset(4)}


@pytest.mark.parametrize("kind", [CAPOTrainer, GroupAdvantageTrainer])
@pytest.mark.parametrize(
    "options",
    [
        BEST,
        {**BEST, "metric_for_best_model": "loss"},
        {**BEST, "metric_for_best_model": "eval_loss"},
        dict(save_strategy="best"),
        dict(save_strategy="best", metric_for_best_model="eval_loss"),
        dict(lr_scheduler_type="reduce_lr_on_plateau"),
        {**BEST, "metric_for_best_model": "eval_a_loss", "sets": TWO},
        {**BEST, "sets": TWO},
        dict(callbacks=[EarlyStoppingCallback()]),
        dict(callbacks=[EarlyStoppingCallback], metric_for_best_model="loss"),
    ],
)
def test_the_loss_is_refused(tmp_path, kind, options):
    with pytest.raises(UserError, match="0 up to rounding.*Set metric_for_best_model to eval_(a_)?reward or eval_"):
        make(tmp_path, kind, **options)


@pytest.mark.parametrize("metric", [None, "loss"])
def test_a_loss_with_a_divergence_is_warned_of(tmp_path, metric):
    with pytest.warns(UserWarning, match="With beta=0.1 this is beta times the divergence"), pytest.raises(ValueError):
        make(tmp_path, beta=0.1, **BEST, metric_for_best_model=metric)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metric_for_best_model="capo/auc_within", sets=TWO), "eval_a_capo/auc_within or eval_b_capo/auc_within"),
        (dict(metric_for_best_model="eval_a_capo/auc_withn", sets=TWO), "Did you mean eval_a_capo/auc_within"),
        (dict(metric_for_best_model="eval_c_reward", sets=TWO), "not logged by any evaluation"),
        (dict(metric_for_best_model="rewrd"), "Did you mean eval_reward"),
        (dict(metric_for_best_model="rewards/parity/mean"), "Did you mean eval_rewards/parity_reward/mean"),
        (dict(metric_for_best_model="eval_accuracy"), "Good choices are eval_reward or eval_capo/auc_within"),
        (dict(metric_for_best_model="capo/frac_masked_wrong"), "evaluation with these settings"),  # there is no mask
        (
            dict(metric_for_best_model="capo/auc", reward=logging_reward),
            "eval_capo/auc_within or eval_capo/auc_pooled",
        ),
        (dict(metric_for_best_model="my_metrc"), "not logged by any evaluation"),
        (dict(metric_for_best_model="eval_kl"), "not logged by any evaluation"),
        (dict(metric_for_best_model="eval_rewar", reward=logging_reward), "Did you mean eval_reward"),
        (dict(metric_for_best_model="capo/auc_within", greater_is_better=False), "would choose the worst model"),
        (dict(metric_for_best_model="capo/soft_misranking", greater_is_better=True), "better the lower it is"),
        (dict(save_strategy="best", eval_strategy="no", metric_for_best_model="reward"), "needs evaluations"),
        (
            dict(callbacks=[EarlyStoppingCallback()], eval_strategy="no", metric_for_best_model="reward"),
            "EarlyStoppingCallback needs evaluations",
        ),
    ],
)
def test_what_no_evaluation_logs_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **{**(BEST if "eval_strategy" not in options else {}), **options})


class LogsMore(TrainerCallback):
    pass


class MyTrainer(CAPOTrainer):
    pass


@pytest.mark.parametrize(
    "options",
    [
        dict(metric_for_best_model="my_metric", reward=logging_reward),
        dict(metric_for_best_model="my_metric", callbacks=[LogsMore()]),
        dict(metric_for_best_model="my_metric", kind=MyTrainer),
        dict(metric_for_best_model="capo/my_metric", kind=MyTrainer),
        dict(metric_for_best_model="eval_kl", beta=0.1),
        dict(metric_for_best_model="capo/frac_masked_wrong", ref_ppl_mask=True),
        dict(metric_for_best_model="eval_b_rewards/parity_reward/mean", sets=TWO),
        dict(metric_for_best_model="completions/mean_length", greater_is_better=False),
        dict(metric_for_best_model="reward", callbacks=[EarlyStoppingCallback()]),
        dict(metric_for_best_model="eval_capo/ppl_wrong"),
        dict(save_strategy="best", metric_for_best_model="reward", load_best_model_at_end=False),
    ],
)
def test_what_may_be_logged_passes(tmp_path, options):
    with pytest.raises(OSError, match="/no/such/model"):
        make(tmp_path, **{**BEST, **options})


def test_a_metric_that_names_no_set_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="taken from the last evaluation set, 'b'.*eval_a_reward, eval_b_reward"):
        with pytest.raises(OSError, match="/no/such/model"):
            make(tmp_path, **BEST, metric_for_best_model="eval_reward", sets=TWO)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("capo/soft_misranking", False),
        ("eval_a_capo/soft_misranking", False),
        ("capo/frac_unscorable", False),
        ("capo/auc_within", True),
        ("eval_reward", True),
        (None, None),
    ],
)
def test_lower_is_better_where_it_is(tmp_path, metric, greater):
    assert config(tmp_path, metric_for_best_model=metric).greater_is_better is greater


@pytest.mark.parametrize("options", [{}, dict(ref_ppl_mask=True, beta=0.1)])
@pytest.mark.parametrize("kind", [CAPOTrainer, GroupAdvantageTrainer])
def test_the_names_are_those_that_an_evaluation_logs(tiny_model, tmp_path, kind, options):
    options = {name: value for name, value in options.items() if kind is CAPOTrainer or name == "beta"}
    args = config(tmp_path, CAPOConfig if kind is CAPOTrainer else GRPOConfig, **options)
    trainer = kind(tiny_model, parity_reward, args, prompt_dataset(), prompt_dataset(8))
    known = {f"eval_{name}" for name in known_metrics(trainer.args, ["parity_reward"], calibrated=True)}
    assert set(trainer.evaluate()) - {"epoch", "eval_loss", "eval_model_preparation_time"} == known


def takes_and_ignores(completions, **kwargs):
    return [1.0 for _ in completions]


def passes_on(completions, **kwargs):
    return takes_and_ignores(completions, **kwargs)


def in_a_closure(completions, **kwargs):
    def inner():
        return kwargs

    return inner()


class LoggingObject:
    def __call__(self, completions, **kwargs):
        kwargs["log_metric"]("a", 1.0)


@pytest.mark.parametrize(
    ("function", "may"),
    [
        (takes_and_ignores, False),
        (functools.partial(takes_and_ignores, a=1), False),
        (passes_on, True),
        (functools.partial(passes_on, a=1), True),
        (in_a_closure, True),
        (logging_reward, True),
        (LoggingObject(), True),
        (parity_reward, False),
        (length_reward, False),
        (accuracy_reward, False),
        ("org/model", False),
        (lambda completions: [1.0], False),
    ],
)
def test_who_may_log_metrics(function, may):
    assert may_log_metrics(function) is may
