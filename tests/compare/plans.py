"""A small plan, as a file."""

import yaml


def plan_for(folder, **changes):
    plan = dict(
        output_dir=str(folder / "out"),
        baseline="grpo",
        seeds=[0, 1],
        benchmarks=["arithmetic_test_2", "arithmetic_test_3"],
        evaluate=dict(num_prompts=5, num_samples=4, max_new_tokens=40),
        train=dict(
            model_name_or_path="arithmetic-base",
            dtype="float32",
            dataset_name="arithmetic",
            reward_funcs=["tests.helpers.parity_reward"],
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=24,
            max_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
        ),
        methods=dict(
            grpo=dict(method="grpo"),
            capo=dict(method="capo", ref_ppl_mask=False, tau=0.5),
            broken=dict(method="grpo", model_name_or_path="/nowhere"),
        ),
    )
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return str(path)
