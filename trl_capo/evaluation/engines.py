"""The two samplers, transformers and vLLM, behind one call."""

import functools
import importlib.util
import os
from collections.abc import Callable

from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.source import model_path


def load_engine(
    model: str,
    state,
    *,
    engine: str = "transformers",
    dtype: str = "auto",
    batch_size: int = 256,
    chat_template_kwargs: dict | None = None,
    **sampling,
) -> tuple[Callable, Callable[[], None]]:
    """Load a model for sampling.

    Args:
        model: Folder, name on the Hub, or name of a shipped model.
        state: accelerate's `PartialState`.
        engine: "transformers" or "vllm".
        dtype: Data type of the weights.
        batch_size: Number of completions to decode together, with transformers.
        chat_template_kwargs: Variables of the chat template.
        sampling: `num_samples`, `temperature`, `seed`, `statistics`.

    Returns:
        A function from prompts, `max_new_tokens` and `first_prompt` to `Samples`, and a function that frees the
        engine's memory.
    """
    model = model_path(model)
    if engine == "vllm":
        from trl_capo.evaluation.vllm import load_vllm, sample_completions_vllm, shut_down

        if state.num_processes > 1:
            _show_own_device(state.local_process_index)
        llm = load_vllm(model, dtype=dtype)
        sampling["chat_template_kwargs"] = chat_template_kwargs
        return functools.partial(sample_completions_vllm, llm, **sampling), functools.partial(shut_down, llm)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.evaluation.sampling import sample_completions

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(state.device)
    tokenizer = with_defaults(AutoTokenizer.from_pretrained(model), chat_template_kwargs)
    sample = functools.partial(
        sample_completions, policy, tokenizer, batch_size=batch_size, progress=False, **sampling
    )
    return sample, lambda: None


def _show_own_device(local_process_index: int) -> None:
    """Show vLLM's engine only this process's GPU. The engine, a separate process, takes the first GPU that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local_process_index + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_process_index % len(devices)]


def choose_engine(asked: str) -> str:
    """The requested engine. For "auto", vLLM if it is installed and a CUDA GPU is available, else transformers."""
    import torch

    if asked != "auto":
        return asked
    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"
