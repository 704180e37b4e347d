"""List the files in a folder that belong in a model repository. All other files stay local.

Weights are safetensors only: a `.bin` or `.pt` file is a pickle, which can contain any code and runs it when loaded.
"""

import json
import re
from pathlib import Path


CARD, CALIBRATION, RECIPE, RECORD = "README.md", "calibration.md", "recipe.yaml", "reproduction.json"
OURS = (CARD, CALIBRATION, RECIPE, RECORD, "abstention.json")
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
UPLOADED = {
    *OURS,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
    INDEX,
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    "quantize_config.json",
    "quantization_config.json",
    # Files that tokenizers and processors save.
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
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
}
# Names with a number or a variant: weights as transformers and PEFT name them, tokenizers of Mistral and tiktoken.
UPLOADED_PATTERN = re.compile(
    r"model(\.(fp|bf|int)\d+)?(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.(fp|bf|int)\d+\.json"
    r"|adapter_model[\w.-]*\.safetensors|tokenizer\.model\.v\d+(m\d+)?|\w+\.tiktoken"
)
# Files in which transformers names the modules with a model's own code.
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
RELATIVE_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+\.(\w+)[ \t]+import|from[ \t]+\.[ \t]+import[ \t]+(\w+))", re.MULTILINE
)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
REFERENCE_ADAPTERS = ("ref", "reference")  # TRL's and ours, for training only

# A figure as a report names it, alone on a line: no separator, no leading dot, one suffix.
FIGURE = re.compile(r"^!\[[^\]\n]*\]\(([0-9A-Za-z_-][0-9A-Za-z_.-]*\.png)\)[ \t]*$", re.MULTILINE)


def figures(text: str, folder: str | Path) -> list[str]:
    """Names of the figures that a report's Markdown shows and that exist in a folder as plain files."""
    paths = [Path(folder) / name for name in dict.fromkeys(FIGURE.findall(text))]
    return [path.name for path in paths if path.is_file() and not path.is_symlink()]


def files_to_upload(folder: str | Path) -> list[str]:
    """The files in a folder that belong in a model repository.

    Args:
        folder: Folder of a model.

    Returns:
        Names relative to the folder, sorted.
    """
    folder = Path(folder)
    belong = {*UPLOADED, *_shards(folder), *_code(folder)}
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and (path.name in belong or UPLOADED_PATTERN.fullmatch(path.name))
    ]
    names += [path.relative_to(folder).as_posix() for path in folder.glob(CHAT_TEMPLATES) if path.is_file()]
    # PEFT saves an adapter that is not called "default" in a folder with its name.
    for config in folder.glob(f"*/{ADAPTER_CONFIG}"):
        adapter = config.parent.name
        if adapter not in REFERENCE_ADAPTERS and not adapter.startswith((".", "_", "checkpoint-")):
            saved = [ADAPTER_CONFIG, *(path.name for path in config.parent.glob("adapter_model*.safetensors"))]
            names += [f"{adapter}/{name}" for name in saved]
    if CALIBRATION in names:
        names += figures((folder / CALIBRATION).read_text(encoding="utf-8"), folder)
    return sorted(names)


def left_behind(folder: str | Path, uploaded: list[str]) -> list[str]:
    """Files, and subfolders with a slash, that a push does not upload.

    Args:
        folder: Folder of a model.
        uploaded: Names of the uploaded files.
    """
    folders = {name.partition("/")[0] for name in uploaded if "/" in name}
    rest = [path for path in sorted(Path(folder).iterdir()) if path.name not in {*uploaded, *folders}]
    return [f"{path.name}/" if path.is_dir() else path.name for path in rest]


def _shards(folder: Path) -> set[str]:
    """Weight files named in the index."""
    shards = _json_dict(folder / INDEX).get("weight_map")
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    return {name for name in names if name.endswith(".safetensors")}


def _code(folder: Path) -> set[str]:
    """Modules named in `auto_map`, and local modules that they import. The model does not load without them."""
    references = [_json_dict(folder / config).get("auto_map") for config in CONFIGS]
    # An entry is text, or for tokenizers a list; text with "--" is code of another repository.
    named = re.findall(r"\"(\w+)\.\w+\"", json.dumps(references))
    found: set[str] = set()
    while named:
        name = f"{named.pop()}.py"
        if name not in found and (folder / name).is_file():
            found.add(name)
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            named += [module or imported for module, imported in RELATIVE_IMPORT.findall(text)]
    return found


def _json_dict(path: Path) -> dict:
    """The dictionary in a JSON file; empty if the file has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
