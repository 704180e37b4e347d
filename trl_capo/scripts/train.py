# /// script
# dependencies = ["trl-capo", "trl[peft]"]
# ///
"""`trl-capo train`: train a model with CAPO, GRPO or another method, from a YAML recipe or options.

    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml
    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml --tau 0.4 --output_dir runs/tau-0.4
    trl-capo train --config recipes/arithmetic/capo/config_demo.yaml --dry-run
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m trl_capo.scripts.train --config ...

As in TRL, options override the recipe, and the recipe overrides the defaults.
"""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext

from trl_capo.cli import main as cli_main
from trl_capo.methods import trainer_of
from trl_capo.recipe import (
    check_options,
    check_recipe,
    make_parser,
    method_and_config,
    parse,
    read_yaml,
    resolved_options,
)


def main(argv: list[str] | None = None) -> int:
    """Train, save, and push if the options say so. Returns 1 if only the push failed, otherwise 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # TrlParser understands only `--config FILE`, in two words.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    method, config_path = method_and_config(argv)
    check_options(argv, method)
    if config_path is not None:
        check_recipe(config_path, read_yaml(config_path), method)
    dry_run: argparse.Namespace | None = None
    launch: AbstractContextManager = nullcontext()
    if {"--dry-run", "--dry_run"} & set(argv):
        from trl_capo.planning.dry_run import as_if_launched, read_launch, take_options

        dry_run, argv = take_options(argv)
        launch = as_if_launched(read_launch(dry_run.accelerate_config)[0])
    parser = make_parser(method)
    with launch:
        script_args, training_args, model_args, data_args, mixture = parse(parser, argv)

    from trl_capo.data.training import load_data
    from trl_capo.preflight.model import check_before_data
    from trl_capo.preflight.rewards import load_reward_function

    model = check_before_data(training_args, model_args.model_name_or_path, another_machine=dry_run is not None)
    reward_funcs = [load_reward_function(name, script_args.normalize_operators) for name in script_args.reward_funcs]
    train_dataset, eval_dataset = load_data(script_args, data_args, mixture, training_args, model_args)
    trainer_class = trainer_of(method)
    if dry_run:
        from trl_capo.planning.dry_run import describe
        from trl_capo.preflight.recipe import check_run

        check_run(trainer_class, training_args, reward_funcs, train_dataset, eval_dataset)
        rows, longest = (train_dataset, eval_dataset), data_args.max_prompt_tokens
        print("\n".join(describe(trainer_class, dry_run, training_args, model_args, model, *rows, longest)))
        return 0

    from trl import get_peft_config, get_quantization_config

    from trl_capo.preflight.model import naming_target_modules
    from trl_capo.publish.push import push_trained
    from trl_capo.publish.record import write_reproduction
    from trl_capo.trainer.progress import RunProgress
    from trl_capo.trainer.resume import checkpoint_to_resume

    resume_from = checkpoint_to_resume(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    with naming_target_modules(model_args):
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
    write_reproduction(trainer, argv, *resolved_options(argv, method, config_path), resume_from)
    if resume_from is not None:
        trainer.accelerator.print(f"⏩ Resuming from {resume_from}.")
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_state()
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir, _internal_call=True)  # otherwise it pushes before the card is written
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    pushed = push_trained(trainer)
    if trainer.accelerator.num_processes > 1:
        # Otherwise DDP's wrapper outlives the process group and frees it while holding the GIL, which gloo's thread
        # may be waiting for.
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    trainer.end()
    return 0 if pushed else 1


if __name__ == "__main__":
    sys.exit(cli_main(["train", *sys.argv[1:]]))
