"""Batches as TRL makes them, with rows of given lengths."""

import torch


def make_batch(prompts: list[int], completions: list[int], prompt_width=None, width=None, seed=0) -> dict:
    """Rows with these lengths, padded as TRL does; ids are random and nonzero, padding is 0."""
    generator = torch.Generator().manual_seed(seed)
    prompt_width, width = prompt_width or max(prompts), width or max(completions)
    prompt_mask = torch.arange(prompt_width) >= prompt_width - torch.tensor(prompts).unsqueeze(1)
    completion_mask = torch.arange(width) < torch.tensor(completions).unsqueeze(1)
    return {
        "prompt_ids": torch.randint(2, 50, prompt_mask.shape, generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": torch.randint(2, 50, completion_mask.shape, generator=generator) * completion_mask,
        "completion_mask": completion_mask.long(),
        "advantages": torch.randn(len(prompts), generator=generator),
        "num_items_in_batch": completion_mask.sum(),
    }
