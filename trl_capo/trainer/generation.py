"""Generation without vLLM that does not compute finished rows: TRL's own, with another decoder in `generate`.

TRL has transformers decode a generation as one batch: every row reads its own copy of the prompt, and every row is
computed until the last one ends. With `generation="compact"`, a prompt is read once for all its completions, and
finished rows leave the batch (`trl_capo.models.decoding`).

Why the law is the same: transformers still prepares the generation, i.e. the settings, the logits processors (from
temperature to repetition penalty) and what ends a row. Each row's next token is drawn by the same function from the
same float32 probabilities, with torch's global random numbers. Only which random numbers a row gets differs, from the
step on at which the first row leaves. As in TRL, the model generates in training mode. If it has dropout, each row
reads the prompt for itself, because completions that share a reading would share its dropout.

The log-probs of the drawn tokens come for free, and can score completions (`mean_logps_from="sampler"`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from trl_capo.errors import UserError
from trl_capo.models.decoding import decode
from trl_capo.preflight.generation import check_decodable, check_generation, check_sampling
from trl_capo.trainer.config import FastGRPOConfig
from trl_capo.trainer.resumable import ResumableGRPOTrainer


class CompactGRPOTrainer(ResumableGRPOTrainer):
    """`ResumableGRPOTrainer` with the option `generation`."""

    args: FastGRPOConfig
    config_class = FastGRPOConfig
    _generates_compactly = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._generates_compactly = self.args.generation == "compact"
        if self._generates_compactly:
            check_generation(self.args, has_rollout_func=self.rollout_func is not None)
            check_decodable(self.accelerator.unwrap_model(self.model), reads_images=self._is_vlm)

    def _generate_single_turn(self, *args, **kwargs):
        if not self._generates_compactly:
            return super()._generate_single_turn(*args, **kwargs)
        # A sharded model communicates in its forward: every rank makes as many steps as the slowest one.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        decoder = partial(decode_compactly, goes_on=self._on_any_rank if sharded else bool)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        token_logps: list[Tensor] = []
        scores = getattr(self.args, "mean_logps_from", "policy") == "sampler"
        if scores:
            if has_dropout(model):
                raise UserError(
                    "mean_logps_from='sampler' would score completions by log-probs with dropout, which are noisy: "
                    "set the model's or the adapter's dropout to 0, or set mean_logps_from='policy'."
                )
            decoder = partial(decoder, token_logps=token_logps)
        with generating_by(decoder, model):
            completion_ids, logps = super()._generate_single_turn(*args, **kwargs)
        if scores:
            rows = torch.cat(token_logps).tolist()
            logps = [row[: len(ids)] for row, ids in zip(rows, completion_ids, strict=True)]
        return completion_ids, logps

    def _on_any_rank(self, value: bool) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(int(value), device=self.accelerator.device)) > 0)


@contextmanager
def generating_by(decoder: Callable[..., Tensor], model: GenerationMixin) -> Iterator[None]:
    """Within it, `model.generate` decodes by `decoder`, which is called like transformers' own (`custom_generate`)."""
    patched = vars(model).get("generate")  # as by code from the Hub
    vars(model)["generate"] = partial(model.generate, custom_generate=decoder)
    try:
        yield
    finally:
        del vars(model)["generate"]
        if patched is not None:
            vars(model)["generate"] = patched


def decode_compactly(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    goes_on: Callable[[bool], bool] = bool,
    token_logps: list[Tensor] | None = None,
    **model_kwargs,  # by no other name: `generate` would take an argument named here away from what it prepares
) -> Tensor:
    """Sample as transformers' `generate` does once it has prepared everything, see its `custom_generate`.

    Args:
        model: Without wrappers.
        input_ids: Prompts, padded on the left, shape (B, S).
        logits_processor, stopping_criteria, generation_config: As prepared by `generate`.
        goes_on: Given whether a row has not ended yet: whether there is another step.
        token_logps: Takes the log-probs of the tokens, (B, T), under the distribution that they are drawn from;
            meaningless after a row's end.
        model_kwargs: What else `generate` would give the model; the attention mask, or None if nothing is padded.

    Returns:
        Prompts and completions, padded on the right, shape (B, S + T).
    """
    check_sampling(generation_config)
    attended = model_kwargs.get("attention_mask")
    attended = torch.ones_like(input_ids) if attended is None else attended
    prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids.cpu(), attended.bool().cpu(), strict=True)]
    # Rows with one key share a reading of their prompt.
    keys = list(enumerate(prompts)) if has_dropout(model) else [(0, prompt) for prompt in prompts]
    reading_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}

    width, pad = input_ids.shape[1], generation_config.pad_token_id
    padding = input_ids.new_full((len(prompts), generation_config.max_length - width), pad)
    sequences = torch.cat([input_ids, padding], dim=1)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=input_ids.device)
    logps = torch.zeros(padding.shape, device=input_ids.device)

    def choose(t: int, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits_processor(sequences[rows, : width + t], logits)  # type: ignore[arg-type]
        token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        if token_logps is not None:
            logps[rows, t] = scores.log_softmax(-1).gather(1, token[:, None])[:, 0]
        sequences[rows, width + t] = token.masked_fill(ended[rows], pad)
        ended[rows] |= stopping_criteria(sequences[rows, : width + t + 1], None)
        return sequences[rows, width + t], ended[rows]

    read = [list(prompt) for _, prompt in reading_of]
    steps = decode(model, read, [reading_of[key] for key in keys], padding.shape[1], choose, goes_on)
    if token_logps is not None:
        token_logps.append(logps)
    return sequences[:, : width + steps]


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether a transformers model draws random numbers in its forward; if in doubt, yes.

    Args:
        model: Each module, also an adapter's, is in training or evaluation mode by itself.
    """
    training = [module for module in model.modules() if module.training]
    # Attention drops, and a router jitters, by a number from the configuration, without a module.
    options = model.config.get_text_config().to_dict().items()
    kinds = ("drop", "jitter", "noise")
    by_option = any(isinstance(value, float) and value > 0 for name, value in options if any(k in name for k in kinds))
    by_module = any(
        ("drop" in type(module).__name__.lower() and getattr(module, "p", 1) != 0)
        or getattr(module, "neftune_noise_alpha", None)
        for module in training
    )
    return (by_option and bool(training)) or by_module
