"""CAPO trainers on the tiny model that record each generation."""

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import config_kwargs, literal_mean_logp, parity_reward, prompt_dataset, unpadded_rows
from trl_capo import CAPOConfig, CAPOTrainer


class RecordingTrainer(CAPOTrainer):
    """Keeps what each generation went in and out with, and the weights that generated it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generations = []

    def _compute_advantages(self, groups):
        self.generations.append({"groups": groups, "training": self.model.training})
        return super()._compute_advantages(groups)

    def _replace_advantages(self, output, advantages):
        groups = self.generations[-1]["groups"]
        self.generations[-1]["advantages"] = advantages.view(groups.valid.shape)
        super()._replace_advantages(output, advantages)

    def _generate_and_score_completions(self, inputs):
        policy = self.accelerator.unwrap_model(self.model)
        weights = {name: value.clone() for name, value in policy.state_dict().items()}
        output = super()._generate_and_score_completions(inputs)
        self.generations[-1] |= {"batch": output, "weights": weights}
        return output


def make_trainer(
    model, tmp_path, trainer_class=RecordingTrainer, reward_funcs=parity_reward, peft_config=None, **options
):
    evaluates = options.get("eval_strategy", "no") != "no"
    return trainer_class(
        model,
        reward_funcs,
        CAPOConfig(**config_kwargs(tmp_path, **options)),
        prompt_dataset(),
        eval_dataset=prompt_dataset(6) if evaluates else None,
        peft_config=peft_config,
    )


def policy_logps(trainer, generation, model_path) -> list[float]:
    """Mean log-probs of a generation's rows, one unpadded forward of the plain model each."""
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    if hasattr(trainer.model, "peft_config"):
        plain = get_peft_model(plain, trainer.model.peft_config["default"])
    plain.load_state_dict(generation["weights"])
    plain.eval()
    return [literal_mean_logp(plain, prompt, completion) for prompt, completion in unpadded_rows(generation["batch"])]
