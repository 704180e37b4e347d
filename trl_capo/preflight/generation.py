"""What `generation="compact"` cannot do: refused before anything is generated."""

import inspect
from collections.abc import Mapping

from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerationMode

from trl_capo.errors import UserError


INSTEAD = "Set generation='trl'."


def check_generation(args, has_rollout_func: bool) -> None:
    """Refuses options with which `generation="compact"` would do nothing, or something else than TRL.

    Args:
        args: The trainer's configuration; plain `GRPOConfig`s are left alone.
        has_rollout_func: Whether completions come from the user's own function.

    Raises:
        UserError: Names the option.
    """
    if getattr(args, "generation", "trl") != "compact":
        return
    others = {
        "use_vllm=True": args.use_vllm,
        "use_transformers_continuous_batching=True": args.use_transformers_continuous_batching,
        "a rollout_func": has_rollout_func,
    }
    for name, there in others.items():
        if there:
            raise UserError(
                f"generation='compact' replaces transformers' `generate`, which is not used with {name}. {INSTEAD}"
            )
    overrides = args.generation_kwargs if isinstance(args.generation_kwargs, Mapping) else {}
    cache = overrides.get("cache_implementation", args.cache_implementation)
    if cache not in (None, "dynamic"):
        raise UserError(
            f"generation='compact' has a cache that shrinks, which cache_implementation={cache!r} does not. Leave "
            "cache_implementation unset, or set generation='trl'."
        )
    check_sampling(GenerationConfig(**{"do_sample": True, **overrides}))


def check_sampling(config: GenerationConfig) -> None:
    """Refuses a generation that does not draw each token from its row's own distribution.

    Raises:
        UserError: Says which option is in the way.
    """
    mode = config.get_generation_mode()
    if mode != GenerationMode.SAMPLE:
        raise UserError(
            f"generation='compact' samples, but generation_kwargs or the model's generation config ask for "
            f"{mode.value.replace('_', ' ')}. {INSTEAD}"
        )
    # These keep a state for each row of a batch that does not shrink.
    for name, neutral in (
        ("guidance_scale", (None, 1)),
        ("watermarking_config", (None,)),
        ("encoder_repetition_penalty", (None, 1)),
        ("encoder_no_repeat_ngram_size", (None, 0)),
    ):
        if getattr(config, name, None) not in neutral:
            raise UserError(f"generation='compact' does not work with {name}. {INSTEAD}")


def check_decodable(model, *, reads_images: bool = False) -> None:
    """Refuses a model whose cache cannot drop rows, or that does not take what `trl_capo.models.decoding` gives it.

    Args:
        model: As trained, perhaps with an adapter.
        reads_images: Whether its prompts hold more than tokens.

    Raises:
        UserError: Says what it lacks.
    """
    if reads_images:
        raise UserError(f"generation='compact' does not work with an image model. {INSTEAD}")
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None:
        if adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None):
            raise UserError(
                f"generation='compact' does not work with an adapter that depends on the prompt "
                f"({type(adapter).__name__}). {INSTEAD}"
            )
        model = model.get_base_model()
    kind = type(model).__name__
    takes = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("attention_mask", "position_ids", "logits_to_keep") if name not in takes]
    if not {"cache", "past_key_values"} & takes.keys():
        missing.append("past_key_values")
    if missing:
        raise UserError(f"generation='compact' does not work with {kind}, which takes no {missing[0]}. {INSTEAD}")
    fixed = [layer for layer in DynamicCache(config=model.config).layers if not hasattr(layer, "batch_select_indices")]
    if fixed or model.config.is_encoder_decoder:
        raise UserError(
            f"generation='compact' does not work with {kind}: rows cannot be removed from the cache of a recurrent or "
            f"encoder-decoder model. {INSTEAD}"
        )
