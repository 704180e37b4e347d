"""A model that answers only when its confidence keeps a promise: N samples, one chosen answer, one confidence.

The confidence of a question is that of Perplexity Consistency: the sum of exp(mean log-prob) over the samples that
agree with the chosen answer, divided by N. It is not the share of votes, because sixteen hesitant votes for one answer
say less than sixteen confident ones. The threshold comes from `trl_capo.calibration.abstention`. Its promise holds for
the model, N, temperature and length that the calibration samples were drawn with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trl_capo.calibration.abstention import Abstention, choose_threshold
from trl_capo.calibration.selection import Selection, choose_all, perplexity_consistency
from trl_capo.errors import UserError
from trl_capo.models.chat_templates import with_defaults


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trl_capo.evaluation.samples import SampleSet
    from trl_capo.models.prompts import Prompt


@dataclass(frozen=True)
class Prediction:
    """A predictor's reply to one question.

    Attributes:
        answer: The chosen answer, even if the predictor abstains; None if no sample had an answer.
        confidence: In [0, 1]; higher means more confident.
        abstains: Whether the confidence is below the threshold.
        completion: The most confident sample with this answer; None if there is no answer.
    """

    answer: str | None
    confidence: float
    abstains: bool
    completion: str | None


def question_confidence(answers: Sequence[str | None], mean_logps: np.ndarray) -> tuple[str | None, float]:
    """The answer that Perplexity Consistency chooses, and its weight averaged over samples.

    Args:
        answers: Canonical answers, length N; None if nothing was extracted.
        mean_logps: Mean token log-prob of each sample, shape (N,).

    Returns:
        The answer or None, and a number in [0, 1], which is 0 without an answer.

    Example:
        >>> question_confidence(["7", "7", "8", None], np.log([0.5, 0.75, 1.0, 0.5]))
        ('7', 0.3125)
    """
    choice = perplexity_consistency(answers, mean_logps)
    return cast("str | None", choice.answer), _mean_weight(choice, len(answers))


def question_table(samples: SampleSet) -> tuple[np.ndarray, np.ndarray]:
    """Correctness (0, 1 or NaN) of the chosen answer to each question, and its confidence, shape (P,) each."""
    choices, right = choose_all(perplexity_consistency, samples.answers, samples.mean_logps, samples.correct)
    return right, np.array([_mean_weight(choice, samples.num_samples) for choice in choices])


def all_questions(sets: Sequence[SampleSet]) -> tuple[np.ndarray, np.ndarray]:
    """`question_table` of several benchmarks, concatenated."""
    tables = [question_table(samples) for samples in sets]
    right, confidence = (np.concatenate(column) for column in zip(*tables, strict=True))
    return right, confidence


def _mean_weight(choice: Selection, num_samples: int) -> float:
    return 0.0 if choice.answer is None else choice.scores[choice.answer] / num_samples


def choose_abstention(
    sets: Sequence[SampleSet], precision: float, delta: float = 0.05, *, sampling: dict | None = None
) -> Abstention:
    """Choose a threshold for a model from its graded samples of calibration questions.

    Args:
        sets: Samples of one or more benchmarks, all with the same number of samples per question.
        precision: The promised share of right answers among those given.
        delta: Probability that the promise fails.
        sampling: The sampling settings, see `Abstention`.

    Raises:
        ValueError: See `choose_threshold`. Also if the sets differ in their number of samples.
    """
    counts = {samples.num_samples for samples in sets}
    if len(counts) > 1:
        raise UserError(
            f"the benchmarks have {', '.join(map(str, sorted(counts)))} samples per question, so their confidences "
            "are not comparable. Evaluate all with the same --num_samples."
        )
    right, confidence = all_questions(sets)
    if np.isnan(right).all():
        raise UserError(
            "no calibration question can be scored: either no gold answer can be read, or no sample has an answer. "
            "Check the columns 'correct' and 'answer'."
        )
    chosen = choose_threshold(right, confidence, precision, delta=delta, name="perplexity_consistency")
    return replace(chosen, num_samples=counts.pop(), sampling=sampling or {})


class SelectivePredictor:
    """Samples, selects, and abstains below a threshold.

    Args:
        model: Decoder-only transformers model, on its device.
        tokenizer: Its tokenizer.
        abstention: Threshold; None never abstains.
        num_samples: Samples per question. None means the threshold's value, else 16.
        max_new_tokens: Longest completion, in tokens. None means the threshold's value, else as long as the context
            allows, at most 3000.
        temperature: Temperature of the sampler. None means the threshold's value, else 1.
        system_prompt: System message before each question. None means the threshold's value, if any.
        chat_template_kwargs: Variables of the chat template. None means the threshold's value, if any.

    Raises:
        ValueError: An option differs from the threshold's value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        abstention: Abstention | None = None,
        *,
        num_samples: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: dict | None = None,
    ):
        chosen_with = dict(abstention.sampling) if abstention else {}
        if chosen_with:  # the record omits it if there were none
            chosen_with.setdefault("chat_template_kwargs", None)
        if abstention and abstention.num_samples is not None:
            chosen_with["num_samples"] = abstention.num_samples
        wanted: dict[str, Any] = dict(
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            system_prompt=system_prompt,
            chat_template_kwargs=chat_template_kwargs or None,
        )
        for name, value in wanted.items():
            known = chosen_with.get(name)
            if value is None:
                wanted[name] = known
            elif name in chosen_with and value != known:
                raise UserError(
                    f"the threshold was chosen with {name}={known!r}, not with {value!r}. Use {known!r}, or choose a "
                    "new threshold."
                )
        self.model, self.abstention = model, abstention
        self.tokenizer = with_defaults(tokenizer, wanted["chat_template_kwargs"])
        self.num_samples, self.temperature = wanted["num_samples"] or 16, wanted["temperature"] or 1.0
        self.max_new_tokens, self.system_prompt = wanted["max_new_tokens"], wanted["system_prompt"]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> SelectivePredictor:
        """Load a model and, if the folder contains one, its `abstention.json`.

        Args:
            path: Folder, name on the Hub, or name of a shipped model.
            options: See the class.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from trl_capo.calibration.abstention import FILE_NAME
        from trl_capo.models.adapter import base_of
        from trl_capo.models.source import model_path

        folder = model_path(str(path))
        base_of(folder)  # refuses an adapter whose base is missing, and names the base
        abstention = Abstention.load(folder) if Path(folder, FILE_NAME).exists() else None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)  # type: ignore[arg-type]
        return cls(model, AutoTokenizer.from_pretrained(folder), abstention, **options)

    def predict(self, questions: Sequence[str], *, seed: int = 0, progress: bool = False) -> list[Prediction]:
        """Answer questions.

        Args:
            questions: Plain questions. They are put into the model's chat template if it has one.
            seed: Seed of the samples.
            progress: Show a progress bar.
        """
        from trl_capo.evaluation.grade import canonical_answers, grade
        from trl_capo.evaluation.sampling import sample_completions

        prompts: list[Prompt] = list(questions)
        if self.tokenizer.chat_template is not None or self.system_prompt is not None:
            system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
            prompts = [[*system, {"role": "user", "content": question}] for question in questions]
        samples = sample_completions(
            self.model,
            self.tokenizer,
            prompts,
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens or self._room(prompts),
            temperature=self.temperature,
            seed=seed,
            progress=progress,
        )
        texts = [text for row in samples.completions for text in row]
        groups = np.repeat(np.arange(len(prompts)), self.num_samples).tolist()
        # There is no gold answer: extracted answers are compared only with each other.
        grades = grade(texts, [r"$0$"] * len(texts), progress=progress)
        names = canonical_answers(grades, groups)
        predictions = []
        for p, logps in enumerate(samples.mean_logps):
            answers = names[p * self.num_samples : (p + 1) * self.num_samples]
            answer, confidence = question_confidence(answers, logps)
            agreeing = [n for n, other in enumerate(answers) if answer is not None and other == answer]
            best = samples.completions[p][max(agreeing, key=lambda n: logps[n])] if agreeing else None
            abstains = answer is None or (
                self.abstention is not None and not bool(self.abstention.answers(confidence))
            )
            predictions.append(Prediction(answer, confidence, abstains, best))
        return predictions

    def predict_or_ask(
        self, fallback: SelectivePredictor | None, questions: Sequence[str], *, seed: int = 0
    ) -> tuple[list[Prediction], set[int]]:
        """`predict`, but ask a fallback predictor (None means nobody) if this one abstains.

        Returns:
            A prediction for each question, and the indices of the questions that the fallback answered.
        """
        predictions = self.predict(questions, seed=seed)
        unsure = [i for i, own in enumerate(predictions) if own.abstains]
        if fallback is None or not unsure:
            return predictions, set()
        for i, said in zip(unsure, fallback.predict([questions[i] for i in unsure], seed=seed), strict=True):
            predictions[i] = said
        return predictions, set(unsure)

    def _room(self, prompts: list) -> int:
        """Number of tokens that the longest prompt leaves in the context, at most 3000."""
        from trl_capo.models.prompts import tokenize

        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        return max(1, min(3000, context - max(map(len, tokenize(self.tokenizer, prompts)))))
