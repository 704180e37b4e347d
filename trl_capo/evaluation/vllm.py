"""Sample completions with vLLM: a faster `sample_completions` on machines that vLLM supports.

Log-probs are vLLM's raw ones: those of the model at temperature 1, whatever the sampling temperature. Each sample is a
separate request with a seed made from `(seed, prompt, sample)`, so that results do not depend on which prompts are
sampled together. Prefix caching still reads each prompt only once. The two engines draw different samples from one
seed.

Self-certainty is NaN, because it needs the whole vocabulary, which vLLM does not return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trl_capo.evaluation.sampling import STATISTICS, TOP_K, Samples, sequence_statistics
from trl_capo.extras import require
from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.prompts import Prompt, tokenize
from trl_capo.models.source import model_path


if TYPE_CHECKING:
    from vllm import LLM


def sample_completions_vllm(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 16,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    first_prompt: int = 0,
    statistics: bool = False,
    chat_template_kwargs: dict | None = None,
) -> Samples:
    """Sample `num_samples` completions of every prompt.

    Args:
        llm: vLLM engine from `load_vllm`, with `logprobs_mode="raw_logprobs"`.
        prompts: P prompts as in TRL datasets, plain strings or lists of messages.
        num_samples: Completions per prompt, N.
        max_new_tokens: Longest completion, in tokens.
        temperature: Temperature of the sampler. The returned log-probs are those at temperature 1.
        seed: Seed of the samples.
        first_prompt: Number of the first prompt.
        statistics: Also compute `STATISTICS`.
        chat_template_kwargs: Variables of the chat template.

    Returns:
        The samples, in the order of `prompts`.
    """
    from vllm import SamplingParams

    tokenizer = with_defaults(llm.get_tokenizer(), chat_template_kwargs)
    prompt_ids = tokenize(tokenizer, list(prompts))
    requests = [{"prompt_token_ids": ids} for ids in prompt_ids for _ in range(num_samples)]
    parameters = [
        SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            logprobs=TOP_K if statistics else 0,
            seed=_request_seed(seed, first_prompt + p, n),
        )
        for p in range(len(prompt_ids))
        for n in range(num_samples)
    ]
    outputs = [result.outputs[0] for result in llm.generate(requests, parameters, use_tqdm=False)]

    shape = (len(prompt_ids), num_samples)
    logps = [
        [position[token].logprob for position, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs
    ]
    extra = {}
    if statistics:
        rows = [sequence_statistics(_token_statistics(o)[None], np.array([len(o.token_ids)])) for o in outputs]
        extra = {name: np.concatenate([row[name] for row in rows]).reshape(shape) for name in STATISTICS}
    texts = [tokenizer.decode(o.token_ids, skip_special_tokens=True) for o in outputs]
    return Samples(
        [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)],
        np.array([min(0.0, np.mean(row)) for row in logps], dtype=np.float64).reshape(shape),
        np.array([len(o.token_ids) for o in outputs], dtype=np.int64).reshape(shape),
        np.array([o.finish_reason == "length" for o in outputs], dtype=bool).reshape(shape),
        extra,
    )


def load_vllm(model: str, *, dtype: str = "auto", max_model_len: int | None = None, **options) -> LLM:
    """A vLLM engine whose log-probs are those at temperature 1.

    Raises:
        ValueError: vLLM is not installed.
    """
    require("vllm")
    from vllm import LLM

    options = dict(logprobs_mode="raw_logprobs", enable_prefix_caching=True, max_logprobs=TOP_K) | options
    return LLM(model_path(model), dtype=dtype, max_model_len=max_model_len, **options)


def shut_down(llm: LLM) -> None:
    """End the engine's process and free its memory for the next model."""
    llm.llm_engine.engine_core.shutdown()


def _request_seed(seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint32)[0])


def _token_statistics(output) -> np.ndarray:
    """Shape (T, 2): NaN for self-certainty, then DeepConf's mean over the likeliest tokens."""
    confidences = []
    for position in output.logprobs:
        # vLLM adds the sampled token if it is not among the likeliest.
        likeliest = sorted((entry.logprob for entry in position.values()), reverse=True)[:TOP_K]
        confidences.append([np.nan, -np.mean(likeliest)])
    return np.array(confidences)
