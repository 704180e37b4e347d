"""Progress reports of a training run: finished steps, and accuracy and calibration in the last logging window."""

from transformers import TrainerCallback

from trl_capo.progress import report_progress


class RunProgress(TrainerCallback):
    """Reports every step to the command that started this one (see `report_progress`)."""

    def __init__(self):
        self.numbers = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            report_progress(state.global_step, state.max_steps, "step", **self.numbers)

    on_step_end = on_train_begin

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("capo/auc_within") is not None:
            self.numbers = {"accuracy": logs.get("reward"), "auc_within": logs["capo/auc_within"]}
