"""Merge a LoRA adapter and its base model into one model that every engine can load.

Merging can change the meaning of an adapter: through weights shared by embedding and output, modules that are saved
whole, or a resized vocabulary. So the merged model is loaded again and must give the adapter's log-probs on a few
tokens.

Only adapters in folders are merged: download an adapter from the Hub first. Needs peft (`pip install
'trl-capo[peft]'`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trl_capo.errors import UserError
from trl_capo.models.source import ModelNotFound, model_path


if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
NUM_TOKENS = 64  # used in the check
TOLERANCE = 1e-3  # mean difference in log-prob, nats, in float32
HALF_TOLERANCE = (
    0.02  # in bfloat16 or float16, whose rounding a merge moves; a tenth of what the adapter does is added
)


def base_of(model: str) -> str:
    """Path of an adapter's base model. Any other model is its own base.

    Raises:
        UserError: The adapter's configuration cannot be read, or its base is a folder that does not exist.
    """
    path = Path(model) / CONFIG
    if not path.exists():
        return model
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path is {base!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not name the adapter's base model: {error!r}.") from error
    try:
        return model_path(base)
    except ModelNotFound as error:
        raise UserError(
            f"{model} is an adapter whose base, {base}, does not exist. Put the base there, or set "
            f"base_model_name_or_path in {path} to another folder or a model on the Hub."
        ) from error


def merged(model: str, folder: Path) -> str:
    """The model to load: an adapter is merged with its base into `folder`; any other model is returned unchanged.

    Args:
        model: A folder, or a name on the Hub.
        folder: Folder for the merged model, unless it already exists.

    Raises:
        UserError: The merged model would differ from the adapter with its base.
    """
    if not (Path(model) / CONFIG).exists():
        return model
    if not folder.exists():
        from trl_capo.extras import require

        require("peft")
        from transformers import AutoTokenizer

        partial = folder.with_suffix(f".{os.getpid()}.partial")  # if killed, not mistaken for the whole
        try:
            expected, tolerance, tied = _merge(model, partial)
            gap = _mean_gap(_saved_logps(partial), expected)
            if not gap <= tolerance and tied:
                _merge(model, partial, untie=True)
                gap = _mean_gap(_saved_logps(partial), expected)
            if not gap <= tolerance:
                raise UserError(
                    f"{model} cannot be merged with its base: log-probs of the merged model differ by {gap:.3g} nats "
                    "on average. Merge it yourself and evaluate the result."
                )
            AutoTokenizer.from_pretrained(model).save_pretrained(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def _merge(model: str, folder: Path, untie: bool = False) -> tuple[torch.Tensor, float, bool]:
    """Merge and save; returns the adapter's log-probs, the tolerance, and whether the base's embeddings are tied."""
    from peft import PeftModel  # its AutoPeftModelForCausalLM resizes the vocabulary to that of the tokenizer
    from transformers import AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    base = AutoModelForCausalLM.from_pretrained(base_of(model), dtype="auto")
    rows, embedding = _vocabulary(model, base), cast("torch.nn.Embedding", base.get_input_embeddings())
    if rows not in (None, embedding.weight.shape[0]):
        base.resize_token_embeddings(rows, mean_resizing=False)
    tied = base.get_input_embeddings().weight is getattr(base.get_output_embeddings(), "weight", None)
    if untie and tied:
        import torch

        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
        output = base.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    adapter = PeftModel.from_pretrained(base, model).eval()
    expected, tolerance = _logps(adapter), TOLERANCE
    if base.dtype.itemsize < 4:
        with adapter.disable_adapter():
            tolerance = HALF_TOLERANCE + 0.1 * _mean_gap(_logps(adapter), expected)
    adapter.merge_and_unload().save_pretrained(folder)
    return expected, tolerance, tied


def _vocabulary(model: str, base) -> int | None:
    """Number of rows in the embedding if the adapter contains all of it: training may have resized it."""
    from safetensors import safe_open

    path = Path(model) / "adapter_model.safetensors"
    if not path.exists():
        return None
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [name for name, module in base.named_modules() if any(module is embedding for embedding in embeddings)]
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dictionary)
            if any(key.endswith(f"{name}.weight") for name in names):
                return file.get_slice(key).get_shape()[0]
    return None


def _saved_logps(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return _logps(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


def _logps(model) -> torch.Tensor:
    """Log-probs after each of a few tokens across the vocabulary, including the last ones, which were often added."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.linspace(rows - 1, 0, min(NUM_TOKENS, rows)).long()
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits.float().log_softmax(-1)


def _mean_gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().mean()) if ours.shape == theirs.shape else float("nan")
