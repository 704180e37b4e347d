# /// script
# dependencies = ["trl-capo", "trl[peft]"]
# ///
"""`trl-capo train`: train a model with CAPO, or with GRPO through the same seam, from a YAML recipe or options.

    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml
    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml --tau 0.4 --output_dir runs/tau-0.4
    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml --dry-run
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m trl_capo.scripts.train --config ...

Conventions are TRL's: an option overrides the recipe, the recipe overrides the default.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError
from trl_capo.recipe import check_options, check_recipe, read_yaml


# One line a method: the configuration and the trainer, imported once the method is chosen.
METHODS = {
    "capo": ("trl_capo.methods.capo_config:CAPOConfig", "trl_capo.methods.capo:CAPOTrainer"),
    "grpo": ("trl_capo.trainer.config:GroupAdvantageConfig", "trl_capo.methods.grpo:GRPO"),
    "gspo": ("trl_capo.methods.gspo:GSPOConfig", "trl_capo.methods.gspo:GSPOTrainer"),
    "codapo": ("trl_capo.methods.codapo:CoDaPOConfig", "trl_capo.methods.codapo:CoDaPOTrainer"),
    "cde": ("trl_capo.methods.cde:CDEConfig", "trl_capo.methods.cde:CDETrainer"),
    "simko": ("trl_capo.methods.simko:SimKOConfig", "trl_capo.methods.simko:SimKOTrainer"),
    "capo_simko": ("trl_capo.methods.simko:CAPOSimKOConfig", "trl_capo.methods.simko:CAPOSimKOTrainer"),
}

# Whose fields are options, beside those of the method.
OPTION_CLASSES = [
    "trl_capo.scripts.train:TrainArguments",
    "trl:ModelConfig",
    "trl_capo.data.training:DataArguments",
    "trl:DatasetMixtureConfig",
]


def make_parser(method: str = "capo", prog: str | None = "trl-capo train"):
    """A `TrlParser` over the options of the script, the method, the model and the dataset."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_capo.data.training import DataArguments

    @dataclass
    class TrainArguments(ScriptArguments):
        method: str = field(default="capo", metadata={"help": f"What to train with: {', '.join(METHODS)}."})
        reward_funcs: list[str] = field(
            default_factory=lambda: ["accuracy_reward"],
            metadata={
                "help": "Reward functions: accuracy_reward (TRL's, in worker processes), other names from trl.rewards "
                "(think_format_reward, ...), or dotted import paths such as my_package.rewards.my_reward."
            },
        )
        normalize_operators: bool = field(
            default=False,
            metadata={
                "help": "Let accuracy_reward mend `\\frac13`, `2\\sqrt3` and `\\boxed 7`, which else are wrong."
            },
        )

    parser = TrlParser(
        (TrainArguments, resolve_name(METHODS[method][0]), ModelConfig, DataArguments, DatasetMixtureConfig),
        prog=prog,
        allow_abbrev=False,
    )
    parser.error = _refuse  # argparse would print hundreds of lines of usage first
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def main(argv: list[str] | None = None) -> int:
    """Train, save, and push if asked to. Returns 1 if only the push failed, else 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # TrlParser knows `--config FILE` only.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    method, config_path = _method_and_config(argv)
    check_options(argv, method, METHODS, OPTION_CLASSES)
    if config_path is not None:
        check_recipe(config_path, read_yaml(config_path), method, METHODS, OPTION_CLASSES)
    dry_run, argv = _take_dry_run(argv)
    parser = make_parser(method)
    with _as_launched(dry_run):
        script_args, training_args, model_args, data_args, mixture = parser.parse_args_and_config(argv)
    from trl_capo.preflight.rewards import load_reward_function

    model = _check_before_data(training_args, model_args.model_name_or_path, is_dry_run=dry_run is not None)
    reward_funcs = [load_reward_function(name, script_args.normalize_operators) for name in script_args.reward_funcs]
    train_dataset, eval_dataset = load_data(script_args, data_args, mixture, training_args, model_args)
    trainer_class = resolve_name(METHODS[method][1])
    if dry_run:
        from trl_capo.planning.dry_run import describe
        from trl_capo.preflight.recipe import check_recipe as check_run

        check_run(trainer_class, training_args, reward_funcs, train_dataset, eval_dataset)
        rows, longest = (train_dataset, eval_dataset), data_args.max_prompt_tokens
        print("\n".join(describe(trainer_class, dry_run, training_args, model_args, model, *rows, longest)))
        return 0
    resume_from = _checkpoint_to_resume(training_args)

    from trl import get_peft_config, get_quantization_config

    from trl_capo.compare.progress import RunProgress
    from trl_capo.publish.record import write_reproduction
    from trl_capo.scripts.push import push_trained

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[RunProgress()],
    )
    write_reproduction(trainer, argv, method, config_path, resume_from)
    if resume_from is not None:
        trainer.accelerator.print(f"⏩ Resuming from {resume_from}.")
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_state()
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir, _internal_call=True)  # or it would push before the card is written
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    pushed = push_trained(trainer)
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        # The model's DDP wrapper now owns the process group. When it is freed, the main thread waits for gloo's thread
        # and holds the GIL, which that thread may still need to free its last gather: let it do so first.
        time.sleep(1)
    return 0 if pushed else 1


def _take_dry_run(argv: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """The options of a dry run, and the others; a recipe for GPUs is then also read on a machine without one."""
    if not {"--dry-run", "--dry_run"} & set(argv):
        return None, argv
    import torch

    from trl_capo.planning import dry_run

    options, rest = dry_run.make_parser().parse_known_args(argv)
    return options, rest if torch.cuda.is_available() else [*rest, "--use_cpu", "true"]


def _as_launched(dry_run: argparse.Namespace | None):
    from contextlib import nullcontext

    if dry_run is None:
        return nullcontext()
    from trl_capo.planning.dry_run import as_if_launched, read_launch

    return as_if_launched(read_launch(dry_run.accelerate_config)[0])


def _method_and_config(argv: list[str]) -> tuple[str, str | None]:
    """The method decides which options exist, so it is read before everything else: option, recipe, default."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--method")
    peek.add_argument("--config")
    if argv.count("--config") > 1:
        raise UserError("--config appears more than once. Keep one recipe, and give the rest as options.")
    found, _ = peek.parse_known_args(argv)
    recipe = read_yaml(found.config) if found.config is not None else {}
    method = found.method or recipe.get("method", "capo")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return method, found.config


def _checkpoint_to_resume(training_args) -> str | None:
    """`--resume_from_checkpoint` takes a folder, or `true` for the newest complete checkpoint, if there is one."""
    from trl_capo.trainer.resume import checkpoint_named, newest_or_zero

    wanted, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
    say = print if training_args.process_index == 0 else lambda line: None
    if str(wanted).lower() == "true":
        return newest_or_zero(output_dir, say)
    if wanted is None or str(wanted).lower() == "false":
        if next(Path(output_dir).glob("checkpoint-*"), None) is not None:
            say(
                f"ℹ️ Starting over in a folder with checkpoints of an earlier run: {output_dir}. Each stays until this "
                "run writes one of the same step. To continue from the newest instead: --resume_from_checkpoint true"
            )
        return None
    checkpoint_named(wanted, output_dir)
    return wanted


def _check_before_data(training_args, model: str | None, is_dry_run: bool) -> str:
    """Refuses what is wrong whatever the data are; returns where the model is."""
    from trl.trainer.grpo_trainer import VLLMGeneration

    from trl_capo.preflight.model import check_engine, check_model, check_others
    from trl_capo.preflight.schedule import check_some_steps

    check_some_steps(training_args)
    if not is_dry_run:  # which is made for another machine
        check_engine(training_args, VLLMGeneration)
    check_others(training_args, [])
    return check_model(_model_path(model))


def _model_path(name: str | None) -> str:
    if name is None:
        raise ValueError(
            "model_name_or_path is missing: set it to a model id, a folder, arithmetic-base or arithmetic-flat."
        )
    from trl_capo.models.source import model_path

    return model_path(name)


def load_data(script_args, data_args, mixture, training_args, model_args) -> tuple:
    """Rows to train on, and to evaluate on if the recipe does.

    The first process prepares them and tells the others which rows are left, for what each would find out for itself
    could differ: math-verify gives up on a gold answer after some seconds.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from datasets import IterableDataset
    from transformers import AutoTokenizer

    from trl_capo.data.training import VALIDATION, load_splits, prepare
    from trl_capo.models.chat_templates import with_defaults

    evaluates, test_split = training_args.eval_strategy != "no", script_args.dataset_test_split
    if data_args.num_validation_prompts and not (evaluates and test_split == VALIDATION):
        raise ValueError(
            f"num_validation_prompts={data_args.num_validation_prompts} puts prompts aside that nothing would use: "
            f"set eval_strategy and dataset_test_split: {VALIDATION}, or num_validation_prompts: 0."
        )
    tokenizer = None
    if data_args.max_prompt_tokens is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            _model_path(model_args.model_name_or_path), revision=model_args.model_revision
        )
        tokenizer = with_defaults(tokenizer, training_args.chat_template_kwargs)
    state = PartialState()
    with state.main_process_first():
        splits = load_splits(
            script_args.dataset_name, script_args.dataset_config, data_args, script_args.dataset_streaming, mixture
        )
    rows = {"train": _split(splits, script_args.dataset_train_split, "dataset_train_split")}
    if evaluates and not data_args.num_validation_prompts:
        rows["eval"] = _split(splits, test_split, "dataset_test_split")
    if any(isinstance(of, IterableDataset) for of in rows.values()):
        prepared = {part: prepare(of, data_args, tokenizer, part, print)["train"] for part, of in rows.items()}
        return prepared["train"], prepared.get("eval")
    kept = [None]
    if state.is_main_process:
        kept = [{part: prepare(of, data_args, tokenizer, part, print) for part, of in rows.items()}]
    kept = broadcast_object_list(kept)[0] if state.num_processes > 1 else kept[0]
    train = rows["train"].select(kept["train"]["train"])
    if not evaluates:
        return train, None
    if VALIDATION in kept["train"]:
        return train, rows["train"].select(kept["train"][VALIDATION])
    return train, rows["eval"].select(kept["eval"]["train"])


def _split(dataset, split: str, option: str):
    if split not in dataset:
        raise ValueError(f"{option}={split!r} is not a split of the dataset: one of {', '.join(dataset)}.")
    return dataset[split]


if __name__ == "__main__":
    sys.exit(cli_main(["train", *sys.argv[1:]]))
