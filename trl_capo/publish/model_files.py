"""Which files of a folder make a model repository: a list of what goes up. Everything else stays here.

Weights are safetensors only: a `.bin` or `.pt` file is a pickle, which can hold anything and runs when it is loaded.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path


CARD, CALIBRATION, RECIPE, RECORD = "README.md", "calibration.md", "recipe.yaml", "reproduction.json"
OURS = (CARD, CALIBRATION, RECIPE, RECORD, "abstention.json")
ADAPTER_CONFIG = "adapter_config.json"
UPLOADED = (
    *OURS,
    "LICENSE*",
    "NOTICE*",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    "quantize_config.json",
    "quantization_config.json",
    # What tokenizers and processors save.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "bpe.codes",
    "merges.txt",
    "normalizer.json",
    "emoji.json",
    "tekken.json",
    "tokenizer.model*",
    "spiece.model",
    "spm.model",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    # Code of a model that transformers does not know, as transformers saves it beside the weights.
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
REFERENCE_ADAPTERS = ("ref", "reference")  # TRL's and ours, for training only

# A figure as a report names it, on a line of its own: no separator, no leading dot, one suffix.
FIGURE = re.compile(r"^!\[[^\]\n]*\]\(([0-9A-Za-z_-][0-9A-Za-z_.-]*\.png)\)[ \t]*$", re.MULTILINE)


def figures(text: str, folder: str | Path) -> list[str]:
    """Names of the figures that a report's Markdown shows and that lie in a folder as plain files."""
    paths = [Path(folder) / name for name in dict.fromkeys(FIGURE.findall(text))]
    return [path.name for path in paths if path.is_file() and not path.is_symlink()]


def files_to_upload(folder: str | Path) -> list[str]:
    """The files of a folder that belong into a model repository.

    Args:
        folder: Folder of a model.

    Returns:
        Names relative to the folder, sorted.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file() and _belongs(path.name)]
    names += [path.relative_to(folder).as_posix() for path in folder.glob(CHAT_TEMPLATES) if path.is_file()]
    # PEFT saves an adapter that is not called "default" in a folder of its name.
    for config in folder.glob(f"*/{ADAPTER_CONFIG}"):
        adapter = config.parent.name
        if adapter not in REFERENCE_ADAPTERS and not adapter.startswith((".", "_", "checkpoint-")):
            saved = [ADAPTER_CONFIG, *(path.name for path in config.parent.glob("adapter_model*.safetensors"))]
            names += [f"{adapter}/{name}" for name in saved]
    if CALIBRATION in names:
        names += figures((folder / CALIBRATION).read_text(encoding="utf-8"), folder)
    return sorted(names)


def left_behind(folder: str | Path, uploaded: list[str]) -> list[str]:
    """What a push of a folder does not take along: files, and subfolders with a slash.

    Args:
        folder: Folder of a model.
        uploaded: Names of the files that go up.
    """
    folders = {name.partition("/")[0] for name in uploaded if "/" in name}
    rest = [path for path in sorted(Path(folder).iterdir()) if path.name not in {*uploaded, *folders}]
    return [f"{path.name}/" if path.is_dir() else path.name for path in rest]


def _belongs(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in UPLOADED)
