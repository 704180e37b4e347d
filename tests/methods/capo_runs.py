"""CAPO trainers on the tiny model that record each generation."""

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import literal_mean_logp, parity_reward, prompt_dataset, tiny_trainer, unpadded_rows
from trl_capo import CAPOTrainer


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


def make_trainer(model, folder, reward_funcs=parity_reward, **options) -> RecordingTrainer:
    if options.get("eval_strategy", "no") != "no":
        options["eval_dataset"] = prompt_dataset(6)
    return tiny_trainer(RecordingTrainer, model, folder, reward_funcs, **options)


def strong_lora(**options) -> LoraConfig:
    """An adapter that changes the model from the start."""
    return LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj"], **options)


def policy_logps(trainer, generation, model_path) -> list[float]:
    """Mean log-probs of a generation's rows, one unpadded forward of the plain model each."""
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    if hasattr(trainer.model, "peft_config"):
        plain = get_peft_model(plain, trainer.model.peft_config["default"])
    plain.load_state_dict(generation["weights"])
    plain.eval()
    return [literal_mean_logp(plain, prompt, completion) for prompt, completion in unpadded_rows(generation["batch"])]
