"""What a LoRA run leaves, an adapter without the weights that it stands on, as a model that every engine can load.

Only folders are looked at: of a model on the Hub, download the adapter first. Needs peft (`pip install
'trl-capo[peft]'`).
"""

import json
import os
from pathlib import Path


CONFIG = "adapter_config.json"


def base_of(model: str) -> str:
    """The model that an adapter stands on; any other model is its own."""
    path = Path(model) / CONFIG
    return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else model


def merged(model: str, folder: Path) -> str:
    """The model to load: for an adapter, itself and its base as one model in `folder`; any other as it is.

    Args:
        model: A folder, or a name on the Hub.
        folder: Where the merged model goes, unless it is there.
    """
    if not (Path(model) / CONFIG).exists():
        return model
    if not folder.exists():
        from trl_capo.extras import require

        require("peft")
        from peft import PeftModel  # its AutoPeftModelForCausalLM resizes the vocabulary to that of the tokenizer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        partial = folder.with_suffix(f".{os.getpid()}.partial")  # killed meanwhile, it is not taken for the whole
        base = AutoModelForCausalLM.from_pretrained(base_of(model), dtype="auto")
        PeftModel.from_pretrained(base, model).merge_and_unload().save_pretrained(partial)
        AutoTokenizer.from_pretrained(model).save_pretrained(partial)
        partial.rename(folder)
    return str(folder)
