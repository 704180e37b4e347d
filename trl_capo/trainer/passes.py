"""Passes without gradient over only the rows that are needed: sorted by length, trimmed, without dropout."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from trl_capo.trainer.generation import CompactGRPOTrainer
from trl_capo.trainer.repack import Batch, Repacking, even_cuts, row_sizes, take, trim


# Inputs of a vision-language model that TRL's forward takes besides tokens. They do not have one row per completion,
# so such batches are passed whole.
_FORWARD = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
MULTIMODAL_INPUTS = [p.name for p in _FORWARD.parameters.values() if p.default is None and p.name != "batch_size"]

# The parts of a batch that a text model's forward needs.
TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class ShortPassesGRPOTrainer(CompactGRPOTrainer):
    """`CompactGRPOTrainer` that computes log-probs of chosen rows, each batch trimmed to its longest row."""

    pad_to_multiple_of: int | None
    _repacking = Repacking(trim=False, sort=False, prune=False)  # like TRL, until the constructor chooses

    @torch.no_grad()
    def _policy_logps(self, output: Batch, rows: Tensor) -> Tensor:
        """Log-probs of the completion tokens under the policy without dropout, shape (B, T); 0 outside `rows`."""
        batch_size = self._no_grad_batch_size()
        with (
            in_eval_mode(self.model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._logps_of_rows(self.model, output, rows, batch_size)

    def _promptless_logps(self, output: Batch, rows: Tensor) -> Tensor:
        """As `_policy_logps`, of completions that follow only the last token of their prompt."""
        alone = {name: output[name][:, -1:] if name.startswith("prompt") else output[name] for name in TOKENS}
        return self._policy_logps(alone, rows)

    def _prompt_logps(self, output: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the prompts' own tokens under the policy without dropout, and their mask, (B, S - 1) each.

        The first token has none. Equal prompts in consecutive rows are read once. 0 for prompts outside `rows`.
        """
        ids, mask = output["prompt_ids"], output["prompt_mask"]
        if ids.size(1) == 1:
            return torch.zeros(ids[:, 1:].shape, device=ids.device), mask[:, 1:]
        left = mask.argsort(dim=1, descending=True, stable=True)  # prompts are padded on the left, completions are not
        ids, mask = ids.gather(1, left) * mask.gather(1, left), mask.gather(1, left)
        is_new = torch.ones_like(rows)
        is_new[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(dim=1)
        prompt = is_new.cumsum(dim=0) - 1  # of each row
        wanted = torch.zeros_like(rows[is_new]).index_put((prompt[rows],), torch.tensor(True, device=rows.device))
        first = is_new.nonzero().squeeze(1)[prompt]  # row that stands for each row's prompt
        batch = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1]}
        batch |= {"completion_ids": ids[:, 1:], "completion_mask": mask[:, 1:]}
        return self._policy_logps(batch, is_new & wanted[prompt])[first], mask[:, 1:]

    def _sorted_logps(self, model, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int):
        """Log-probs for TRL's own pass over a generation, computed in sorted and trimmed batches."""
        prompt_width = input_ids.size(1) - logits_to_keep
        batch = {
            "prompt_ids": input_ids[:, :prompt_width],
            "prompt_mask": attention_mask[:, :prompt_width],
            "completion_ids": input_ids[:, prompt_width:],
            "completion_mask": attention_mask[:, prompt_width:],
        }
        return self._logps_of_rows(model, batch, None, batch_size)

    @torch.no_grad()
    def _logps_of_rows(self, model, batch: Batch, rows: Tensor | None, batch_size: int) -> Tensor:
        """Log-probs of completion tokens (B, T) from TRL's forward; 0 at padding and outside `rows` (None: all)."""
        if self._is_vlm:  # images do not have one row per completion: pass the batch whole
            multimodal = {name: batch[name] for name in MULTIMODAL_INPUTS if name in batch}
            return self._logps_of_batch(model, batch, batch_size=batch_size, **multimodal)
        sizes = row_sizes(batch)
        lengths = sizes.sum(dim=1)
        index = torch.arange(len(lengths), device=lengths.device) if rows is None else rows.nonzero().squeeze(1)
        if self._repacking.trim:
            index = index[lengths[index].argsort(descending=True, stable=True)]
            batch_size = 2 * batch_size  # no activations are kept, and sorted rows need less padding
        calls = math.ceil(len(index) / batch_size)
        if rows is not None:
            # A sharded model communicates in its forward, so every rank makes as many calls as the busiest one.
            calls = int(self.accelerator.gather(torch.tensor([calls], device=lengths.device)).max())
        logps = torch.zeros(batch["completion_ids"].shape, device=lengths.device)
        if calls == 0:
            return logps
        shortest = lengths.argmin().expand(max(0, calls - len(index)))
        index = torch.cat([index, shortest])
        if self._repacking.trim:
            parts = index.split(even_cuts(sizes[index].tolist(), calls))
        else:
            parts = index.tensor_split(calls)
        for part in parts:
            micro_batch = take({name: batch[name] for name in TOKENS}, part)
            if self._repacking.trim:
                micro_batch = trim(micro_batch, self.pad_to_multiple_of)
            part_logps = self._logps_of_batch(model, micro_batch)
            logps[part, : part_logps.size(1)] = part_logps.float()
        return logps if rows is None else logps.masked_fill(~rows.unsqueeze(1), 0.0)

    def _logps_of_batch(self, model, batch: Batch, **kwargs) -> Tensor:
        logps, *_ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            **kwargs,
        )
        return logps

    def _no_grad_batch_size(self) -> int:
        training = self.model.training
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
