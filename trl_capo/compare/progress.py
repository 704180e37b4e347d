"""A progress bar for training runs that share one terminal."""

from tqdm import tqdm
from transformers import TrainerCallback


class RunProgress(TrainerCallback):
    """One line a run: steps done, and accuracy and calibration of the last logging window.

    Args:
        name: What stands before the bar.
        position: Line of the bar, counted from 0, among those of other processes.
    """

    def __init__(self, name: str, position: int = 0):
        self.name = name
        self.position = position

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", position=self.position
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("capo/auc_within") is not None:
            self.bar.set_postfix(accuracy=f"{logs['reward']:.2f}", auc_within=f"{logs['capo/auc_within']:.2f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
