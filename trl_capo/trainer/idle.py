"""Reports once that a run has nothing to learn from: all advantages have been 0 for many generations."""

from dataclasses import dataclass, field


@dataclass
class IdleWatch:
    """Counts consecutive generations whose advantages are all 0.

    Attributes:
        patience: Number of such generations after which it reports, once.
        fractions: For each of them, the shares of prompts with only right and with only wrong answers.
    """

    patience: int = 20
    fractions: list[tuple[float, float]] = field(default_factory=list)
    has_spoken: bool = False

    def update(self, learns: bool, all_correct: float, all_wrong: float) -> str | None:
        """Records a generation. Returns the line to print, or None if there is nothing to report.

        Args:
            learns: Whether any of its advantages is not 0.
            all_correct: Share of its prompts with only right answers.
            all_wrong: Share of its prompts with only wrong answers.

        Example:
            >>> watch = IdleWatch(patience=2)
            >>> watch.update(False, 0.0, 1.0), "all wrong for 100% of the prompts" in watch.update(False, 0.0, 1.0)
            (None, True)
        """
        if self.has_spoken:
            return None
        self.fractions = [] if learns else [*self.fractions, (all_correct, all_wrong)]
        if len(self.fractions) < self.patience:
            return None
        self.has_spoken = True
        right, wrong = (sum(values) / len(values) for values in zip(*self.fractions, strict=True))
        if wrong >= max(right, 0.5):
            advice = "Choose easier prompts, or check that max_completion_length is long enough and answers are parsed"
        elif right >= 0.5:
            advice = "Choose harder prompts"
        else:
            advice = "Check capo/frac_mixed, capo/frac_masked_* and capo/frac_unscorable"
        return (
            f"⚠️ Nothing was learnt in the last {self.patience} generations: every advantage was 0. Answers were all "
            f"right for {right:.0%} and all wrong for {wrong:.0%} of the prompts. {advice}."
        )
