"""Recipes and options of `trl-capo train`: read, checked before anything heavy is imported, parsed, written down."""

import argparse
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from trl_capo.errors import UserError
from trl_capo.methods import METHODS, trainer_of
from trl_capo.options import known_options, option_problem, suggestion
from trl_capo.redact import redact


# A recipe may come from a stranger. Variables can replace programs and libraries, or send tokens and data elsewhere,
# so only those that tune or name a run may stand in one.
ENV_PREFIXES = ("HF_", "NCCL_", "TOKENIZERS_", "TORCH_NCCL_", "TRACKIO_", "VLLM_", "WANDB_")
ENV_NAMES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    "TRL_EXPERIMENTAL_SILENCE",
}
# Words of a name that is refused in spite of its prefix: credentials, addresses, and code or files to load.
ENV_REFUSED = re.compile(
    r"(^|_)(TOKEN|KEY|SECRET|PASS|PASSWORD|PASSWD|CREDENTIALS?|AUTH|NETRC|ENDPOINT|URL|URI|HOST|PROXY|SERVER|PLUGINS?"
    r"|PATH|LIB|LIBRARY|MODULES?|CONF|FILE|COMMAND|EXECUTABLE|WORKER|CLASS|CLS|HOOKS?|TUNER|NET|INSECURE|TRUST|PICKLE"
    r"|KERNELS?)(_|$)"
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of `key: value` lines.

    Args:
        path: A YAML file.

    Returns:
        Its content.

    Raises:
        UserError: The path is no file, or the file is not YAML, is empty, holds no keys or holds one twice.
        OSError: It cannot be read.
    """
    import yaml

    if Path(path).is_dir():
        raise UserError(f"{path} is a folder. Give the YAML file in it.")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _loader())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        found = "nothing" if not content else type(content).__name__
        raise UserError(f"{path} must hold one `key: value` a line, got {found}.")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: key {strange[0]!r} is not text. Put it in quotes, or remove it.")
    return content


@lru_cache(maxsize=1)
def _loader():
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} appears twice; keep one", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def check_env(path: str, env: Any) -> None:
    """Refuse environment variables that a recipe may not set.

    Raises:
        UserError: Names the variable.
    """
    if env is None:
        return
    if not isinstance(env, dict):
        raise UserError(f"{path}: env must hold one `NAME: value` a line, got {env!r}.")
    for name, value in env.items():
        allowed = isinstance(name, str) and (name in ENV_NAMES or name.startswith(ENV_PREFIXES))
        if not allowed or (name not in ENV_NAMES and ENV_REFUSED.search(name)):
            raise UserError(
                f"{path}: env may not set {name!r}, because it can run other code or send data elsewhere. If you mean "
                "it, remove it here and `export` it in the shell. recipes/README.md lists what a recipe may set."
            )
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise UserError(f"{path}: env {name} must be text or a number, got {value!r}.")


def check_recipe(path: str, recipe: dict, method: str) -> None:
    """Refuse a recipe with a key that is no option of its method, or a value of another type.

    Args:
        path: Names the recipe in messages.
        recipe: Its content.
        method: Which method it is for.

    Raises:
        UserError: Says which key, and what may have been meant; or why the method cannot be used.
    """
    check_env(path, recipe.get("env"))
    if {"baseline", "methods"} <= recipe.keys():
        raise UserError(f"{path} is a plan for `trl-capo compare`, not a recipe for `trl-capo train`.")
    try:
        known = known_options(method)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if known is None:
        return
    for key, value in recipe.items():
        if key == "env":
            continue
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}.{suggestion(key, list(known), key, method)}")
        if problem := option_problem(key, value, known[key]):
            raise UserError(f"{path}: {key} must be {problem}, got {value!r}.")


def check_options(argv: list[str], method: str) -> None:
    """Refuse an unknown option, or a value of another type, on the command line.

    Raises:
        UserError: Says which, and what may have been meant.
    """
    known = known_options(method)
    if known is None:
        return
    extra = {"config", "help", "dry_run", "accelerate_config", "gpu_memory"}
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name in extra or name.removeprefix("no_") in known and name not in known:
            continue
        if name not in known:
            spelt = [f"--{key}" for key in [*known, *extra]]
            raise UserError(f"unknown option {option}.{suggestion(option, spelt, name, method)}")
        if not equals:
            value = argv[position + 1] if position + 1 < len(argv) else "--"
        if not value.startswith("--") and (problem := option_problem(name, value, known[name])):
            raise UserError(f"{option} must be {problem}, got {value!r}.")


def method_and_config(argv: list[str]) -> tuple[str, str | None]:
    """The method decides which options exist, so it is read before everything else: option, recipe, default.

    Returns:
        The method, and the recipe's path; None without one.

    Raises:
        UserError: There is no such method, or the recipe cannot be read.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--method")
    peek.add_argument("--config")
    if argv.count("--config") > 1:
        raise UserError("--config appears more than once. Keep one recipe, and give the rest as options.")
    found, _ = peek.parse_known_args(argv)
    recipe = read_yaml(found.config) if found.config is not None else {}
    method = found.method or recipe.get("method", "capo")
    if method not in list(METHODS):  # in a recipe it may be anything
        trainer_of(method)
    return method, found.config


def make_parser(method: str = "capo"):
    """A `TrlParser` over the options of the command, the method, the model and the dataset."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_capo.data.training import DataArguments

    @dataclass
    class TrainArguments(ScriptArguments):
        method: str = field(
            default="capo",
            metadata={"help": f"What to train with: {', '.join(METHODS)}, or package.module:Trainer of your own."},
        )
        reward_funcs: list[str] = field(
            default_factory=lambda: ["accuracy_reward"],
            metadata={
                "help": "Reward functions: accuracy_reward (TRL's, in worker processes), other names from trl.rewards "
                "(think_format_reward, ...), or dotted import paths such as my_package.rewards.my_reward."
            },
        )
        normalize_operators: bool = field(
            default=False,
            metadata={
                "help": "Let accuracy_reward mend `\\frac13`, `2\\sqrt3` and `\\boxed 7`, which else are wrong."
            },
        )

    config_class = trainer_of(method).config_class
    parser = TrlParser(
        (TrainArguments, config_class, ModelConfig, DataArguments, DatasetMixtureConfig),
        prog="trl-capo train",
        allow_abbrev=False,
    )
    parser.error = _refuse  # argparse would print hundreds of lines of usage first
    return parser


def parse(parser, argv: list[str]) -> tuple:
    """The configurations that a command line and its recipe give.

    Raises:
        UserError: One of them refuses its values.
    """
    try:
        return parser.parse_args_and_config(argv)
    except UserError:
        raise
    except ValueError as error:  # whatever a configuration refuses is what the user chose
        raise UserError(str(error)) from error


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def resolved_options(argv: list[str], method: str, config_path: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The options of a run that differ from their defaults, as a recipe gives them.

    They are taken as they were typed, before the configuration derives others from them: what is derived may not be
    given together with what it is derived from.

    Args:
        argv: Words of the command line after `trl-capo train`, with `--config FILE` in two words.
        method: Name of the method.
        config_path: The recipe, None without one.

    Returns:
        Options by name, `method` first, without secrets and without `resume_from_checkpoint`; and the names of the
        secrets that were left out.
    """
    parser = make_parser(method)
    defaults = vars(parser.parse_args([]))
    words, environment = list(argv), {}
    if config_path is not None:
        recipe = read_yaml(config_path)
        environment = recipe.pop("env", None) or {}
        parser.set_defaults_with_config(**recipe)
        at = words.index("--config")
        del words[at : at + 2]
    chosen = vars(parser.parse_args(words))
    not_kept = {"method", "resume_from_checkpoint"}
    options = {name: value for name, value in chosen.items() if value != defaults[name] and name not in not_kept}
    options = {"method": method, **({"env": environment} if environment else {}), **options}
    left_out: list[str] = []
    return redact(json.loads(json.dumps(options, default=str)), left_out), left_out
