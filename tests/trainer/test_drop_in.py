"""What TRL's trainer takes, ours takes: each form of each argument, by name and by position; and its messages."""

import asyncio
import functools
import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import config_kwargs, length_reward, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageTrainer


def grpo(folder, **options) -> GRPOConfig:
    return GRPOConfig(**config_kwargs(folder, **options))


def capo(folder, **options) -> CAPOConfig:
    return CAPOConfig(**config_kwargs(folder, ref_ppl_mask=False, **options))


BOTH = pytest.mark.parametrize(("trainer_class", "config"), [(GroupAdvantageTrainer, grpo), (CAPOTrainer, capo)])


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("reward") / "tiny-judge")
    config = Qwen2Config.from_pretrained(tiny_model)
    config.num_labels = 1
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


async def async_reward(completion_ids, **kwargs):
    await asyncio.sleep(0)
    return parity_reward(completion_ids)


def sometimes_none(completion_ids, **kwargs):
    return [None if len(ids) % 2 else 1.0 for ids in completion_ids]


class ParityObject:
    """A reward that is an object, with no name of its own."""

    def __call__(self, completion_ids, **kwargs):
        return parity_reward(completion_ids)


def last_train_loss(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[-1]["train_loss"]


def test_the_constructors_take_the_same_arguments_in_the_same_order():
    for trainer_class in (GroupAdvantageTrainer, CAPOTrainer):
        ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (trainer_class, GRPOTrainer))
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@BOTH
def test_all_arguments_by_position(tiny_model, tmp_path, trainer_class, config):
    from peft import LoraConfig

    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    counts, peft = Counts(), LoraConfig(task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    datasets = prompt_dataset(), prompt_dataset(8)
    trainer = trainer_class(
        *(model, [parity_reward], config(tmp_path), *datasets, tokenizer, [None], [counts]),
        *((None, None), None, peft, None, None, None),
    )
    trainer.train(None, None, ["nothing"])
    assert counts.steps == 1 and trainer.processing_class is tokenizer
    assert "default" in trainer.accelerator.unwrap_model(trainer.model).peft_config


@BOTH
def test_an_optimizer_of_ones_own(tiny_model, tmp_path, trainer_class, config):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = trainer_class(model, parity_reward, config(tmp_path), prompt_dataset(), optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.25


REWARDS = {
    "function": lambda judge: parity_reward,
    "partial": lambda judge: functools.partial(parity_reward, unused=1),
    "object": lambda judge: ParityObject(),
    "async": lambda judge: async_reward,
    "name of a model": lambda judge: judge,
    "model": lambda judge: AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1),
    "some None": lambda judge: sometimes_none,
    "list of one": lambda judge: [parity_reward],
    "several": lambda judge: [parity_reward, length_reward],
    "several, some None": lambda judge: [sometimes_none, length_reward],
    "mixed": lambda judge: [async_reward, judge, length_reward],
}


@pytest.mark.parametrize("form", REWARDS)
@BOTH
def test_every_form_of_reward(tiny_model, reward_model, tmp_path, trainer_class, config, form):
    rewards = REWARDS[form](reward_model)
    options = {}
    if trainer_class is CAPOTrainer and isinstance(rewards, list) and len(rewards) > 1:
        options["correctness_reward"] = rewards[0].__name__
    trainer = trainer_class(tiny_model, rewards, config(tmp_path, **options), prompt_dataset())
    assert last_train_loss(trainer) is not None
    names = trainer.reward_func_names
    assert all(f"rewards/{name}/mean" in trainer.state.log_history[0] for name in names)
    assert "tiny-judge" in names or form not in ("name of a model", "model", "mixed")


def test_grpo_needs_no_label(tiny_model, tmp_path, capsys):
    """With several rewards and TRL's own configuration it is TRL's GRPO: same parameters, no calibration metrics."""
    parameters, logged = [], []
    for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
        args = grpo(
            tmp_path / trainer_class.__name__, reward_weights=[1.0, 0.5], max_steps=3, optim="sgd", learning_rate=0.05
        )
        trainer = trainer_class(tiny_model, [parity_reward, length_reward], args, prompt_dataset(), prompt_dataset(8))
        trainer.train()
        metrics = trainer.evaluate()
        parameters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logged.append(set(trainer.state.log_history[0]) | set(metrics))
    start = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()])
    assert (parameters[0] - start).abs().max() > 1e-3
    assert (parameters[0] - parameters[1]).abs().max() < 1e-6
    assert logged[0] == logged[1]
    printed = capsys.readouterr().out
    assert printed.count("trains without the calibration metrics") == 1
    assert "set correctness_reward to one of parity_reward, length_reward in a GroupAdvantageConfig" in printed


def test_a_method_that_compares_right_and_wrong_needs_a_label(tmp_path):
    with pytest.raises(ValueError, match="set correctness_reward"):
        CAPOTrainer("/no/such/model", [parity_reward, length_reward], capo(tmp_path), prompt_dataset())


def test_a_configuration_derived_from_trls_is_trls(tiny_model, tmp_path):
    class Mine(GRPOConfig):
        pass

    args = Mine(**config_kwargs(tmp_path))
    assert last_train_loss(GroupAdvantageTrainer(tiny_model, parity_reward, args, prompt_dataset())) is not None
    with pytest.raises(TypeError, match="takes a CAPOConfig as args, got Mine"):
        CAPOTrainer(tiny_model, parity_reward, args, prompt_dataset())


@BOTH
def test_without_a_configuration_the_folder_is_named_after_the_model(tmp_path, monkeypatch, trainer_class, config):
    @dataclass
    class CPUConfig(trainer_class.config_class):  # TRL's defaults need a GPU
        bf16: bool = False
        use_cpu: bool = True
        ref_ppl_mask: bool = False

    monkeypatch.setattr(trainer_class, "config_class", CPUConfig)
    monkeypatch.chdir(tmp_path)
    trainer = trainer_class("arithmetic-flat", parity_reward, train_dataset=prompt_dataset())
    assert trainer.args.output_dir == f"arithmetic-flat-{trainer_class._name}"


def streamed(num_prompts: int = 16) -> IterableDataset:
    rows = prompt_dataset(num_prompts).to_list()
    return IterableDataset.from_generator(lambda: iter(rows))


EVAL_SETS = {
    "set": lambda: prompt_dataset(4),
    "stream": lambda: streamed(4),
    "dict": lambda: {"a": prompt_dataset(4), "b": prompt_dataset(6)},
    "DatasetDict": lambda: DatasetDict({"a": prompt_dataset(4), "b": prompt_dataset(6)}),
    "dict of streams": lambda: {"a": streamed(4), "b": streamed(4)},
}


@pytest.mark.parametrize("form", EVAL_SETS)
@BOTH
def test_every_form_of_data(tiny_model, tmp_path, trainer_class, config, form):
    args = config(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = trainer_class(tiny_model, parity_reward, args, streamed(), EVAL_SETS[form]())
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    prefixes = ("eval_", "eval_a_", "eval_b_") if "ict" in form else ("eval_",)
    for prefix in prefixes:
        assert {f"{prefix}reward", f"{prefix}rewards/parity_reward/mean"} <= logged
    assert {f"{prefix}capo/auc_within" for prefix in prefixes[-2:]} <= logged


def test_metrics_of_several_sets_are_told_apart(tiny_model, tmp_path):
    """TRL logs the last set's as eval_reward, over the first's; here each also has its own."""

    def reward(prompts, **kwargs):
        return [float(len(prompt[0]["content"])) for prompt in prompts]

    short, long = ([[{"role": "user", "content": text}]] * 2 for text in ("1", "123456"))
    sets = {"short": Dataset.from_dict({"prompt": short}), "long": Dataset.from_dict({"prompt": long})}
    trainer = GroupAdvantageTrainer(tiny_model, reward, grpo(tmp_path), prompt_dataset(), sets)
    metrics = trainer.evaluate()
    assert (metrics["eval_short_reward"], metrics["eval_long_reward"], metrics["eval_reward"]) == (1.0, 6.0, 6.0)


@BOTH
def test_plain_text_prompts(tiny_model, tmp_path, trainer_class, config):
    rows = Dataset.from_dict({"prompt": ["1+1=", "2+3=", "7-", "12"], "other": [1, 2, 3, 4]})
    seen = []

    def reward(completions, prompts, other, **kwargs):
        seen.extend(zip(prompts, other, strict=True))
        return [float(len(text)) for text in completions]

    trainer = trainer_class(tiny_model, reward, config(tmp_path), rows)
    assert last_train_loss(trainer) is not None
    assert set(seen) <= set(zip(rows["prompt"], rows["other"], strict=True)) and len(set(seen)) == 2


class TestUnusualTrainers:
    """TRL's tests call its methods on trainers that no constructor has seen."""

    @pytest.mark.parametrize("use_vllm", [False, True])
    def test_generate(self, use_vllm):
        trainer = object.__new__(GroupAdvantageTrainer)
        names = ["mean_length", "min_length", "max_length", "clipped_ratio"]
        names += [f"{statistic}_terminated_length" for statistic in ("mean", "min", "max")]
        vars(trainer).update(
            accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True, gather=lambda x: x),
            args=SimpleNamespace(report_to=[]),
            model=SimpleNamespace(training=True),
            state=SimpleNamespace(global_step=2, num_input_tokens_seen=0),
            use_vllm=use_vllm,
            use_transformers_continuous_batching=False,
            vllm_generation=SimpleNamespace(sync_weights=lambda: None),
            processing_class=SimpleNamespace(batch_decode=lambda *args, **kwargs: ["7"]),
            tools=None,
            rollout_func=lambda prompts, trainer: {"prompt_ids": [[1]], "completion_ids": [[3]], "logprobs": [[-1.0]]},
            eos_token_ids=[2],
            _last_loaded_step=1,
            _tokenizer=SimpleNamespace(eos_token_id=2, pad_token_id=0),
            _metrics={"train": {"num_tokens": [], **{f"completions/{name}": [] for name in names}}},
        )
        assert trainer._generate(["1+1="])[1] == [[3]]
        assert trainer._last_loaded_step == (2 if use_vllm else 1)


@BOTH
def test_processing_classes_are_counted_first(reward_model, tmp_path, trainer_class, config):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    with pytest.raises(ValueError, match="processing classes .* must match"):
        trainer_class(
            "/no/such/model",
            [reward_model, reward_model],
            config(tmp_path),
            prompt_dataset(),
            reward_processing_classes=tokenizer,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reward_funcs=None), "No reward source provided"),
        (dict(train_dataset=None), "`train_dataset` is required"),
        (dict(reward_weights=[1.0, 2.0]), "reward weights .* must match"),
    ],
)
def test_trls_own_errors_come_through(tiny_model, tmp_path, arguments, message):
    args = grpo(tmp_path, **{name: arguments.pop(name) for name in list(arguments) if name == "reward_weights"})
    arguments = {"reward_funcs": parity_reward, "train_dataset": prompt_dataset(), **arguments}
    with pytest.raises(ValueError, match=message):
        GroupAdvantageTrainer(tiny_model, args=args, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        dict(max_steps=6),  # save_steps is 500
        dict(max_steps=-1, num_train_epochs=2),
        dict(max_steps=5, save_steps=5),  # the last checkpoint may lie anywhere
        dict(max_steps=1000, save_strategy="no"),
        dict(max_steps=1000, save_strategy="epoch"),
    ],
)
def test_checkpoints_that_are_never_written_are_no_reason_to_refuse(tmp_path, options):
    layout = {"steps_per_generation": 3, "save_strategy": "steps", **options}  # 500 is no multiple of 3
    with pytest.raises(OSError, match="/no/such/model"):
        GroupAdvantageTrainer("/no/such/model", parity_reward, grpo(tmp_path, **layout), prompt_dataset())


@pytest.mark.parametrize(
    "options", [dict(max_steps=501), dict(max_steps=-1, num_train_epochs=100), dict(max_steps=20, save_steps=0.2)]
)
def test_those_that_are_written_are(tmp_path, options):
    layout = {"steps_per_generation": 3, "save_strategy": "steps", **options}
    with pytest.raises(ValueError, match="in the middle of a generation"):
        GroupAdvantageTrainer("/no/such/model", parity_reward, grpo(tmp_path, **layout), prompt_dataset())


@BOTH
def test_shipped_models_have_names(tmp_path, trainer_class, config):
    trainer = trainer_class("arithmetic-base", parity_reward, config(tmp_path), prompt_dataset())
    assert trainer.model.num_parameters() > 100_000


def test_early_stopping(tiny_model, tmp_path):
    args = capo(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_capo/auc_within"
    )
    trainer = CAPOTrainer(
        *(tiny_model, parity_reward, args, prompt_dataset(), prompt_dataset(8)),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
    )
    assert last_train_loss(trainer) is not None
