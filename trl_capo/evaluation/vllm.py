"""Sample completions with vLLM: what `sample_completions` gives, faster, on the machines that vLLM supports.

Log-probs are vLLM's raw ones, of the model at temperature 1, whatever temperature samples. Each sample is a request of
its own with a seed made of `(seed, prompt, sample)`, so that results do not depend on which prompts are sampled
together; prefix caching reads each prompt once all the same. The two engines draw different samples from one seed.

Of the statistics, self-certainty needs the whole vocabulary, which vLLM does not return: it is NaN.
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
        llm: vLLM engine, made by `load_vllm`: with `logprobs_mode="raw_logprobs"`.
        prompts: P prompts as in TRL datasets, plain strings or lists of messages.
        num_samples: Completions per prompt, N.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampler; the log-probs returned are those at temperature 1.
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
        ValueError: If vLLM is not installed.
    """
    require("vllm")
    from vllm import LLM

    options = dict(logprobs_mode="raw_logprobs", enable_prefix_caching=True, max_logprobs=TOP_K) | options
    return LLM(model_path(model), dtype=dtype, max_model_len=max_model_len, **options)


def shut_down(llm: LLM) -> None:
    """End the engine's process and free its memory, which the next model needs."""
    llm.llm_engine.engine_core.shutdown()


def _request_seed(seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint32)[0])


def _token_statistics(output) -> np.ndarray:
    """(T, 2): NaN for self-certainty, DeepConf's mean over the likeliest tokens."""
    confidences = []
    for position in output.logprobs:
        # vLLM adds the sampled token when it is not among the likeliest.
        likeliest = sorted((entry.logprob for entry in position.values()), reverse=True)[:TOP_K]
        confidences.append([np.nan, -np.mean(likeliest)])
    return np.array(confidences)
