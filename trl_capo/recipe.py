"""Recipes and options of `trl-capo train`: read them, check them before heavy imports, parse them, record them."""

import argparse
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from trl_capo.errors import UserError
from trl_capo.methods import METHODS, trainer_of
from trl_capo.options import known_options, option_problem, suggestion
from trl_capo.redact import redact


# A recipe may come from a stranger. Variables can replace programs and libraries, read and write files, or send tokens
# and data elsewhere, so a recipe may set only those that tune or name a run, each by its exact name.
ENV_NAMES = frozenset(
    """
    CUBLAS_WORKSPACE_CONFIG CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME
    MKL_NUM_THREADS OMP_NUM_THREADS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF
    TOKENIZERS_PARALLELISM TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY TRL_EXPERIMENTAL_SILENCE

    HF_DATASETS_DISABLE_PROGRESS_BARS HF_DATASETS_IN_MEMORY_MAX_SIZE HF_DATASETS_OFFLINE
    HF_HUB_DISABLE_EXPERIMENTAL_WARNING HF_HUB_DISABLE_IMPLICIT_TOKEN HF_HUB_DISABLE_PROGRESS_BARS
    HF_HUB_DISABLE_SYMLINKS HF_HUB_DISABLE_SYMLINKS_WARNING HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_XET
    HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ENABLE_HF_TRANSFER HF_HUB_ETAG_TIMEOUT HF_HUB_OFFLINE HF_HUB_VERBOSITY
    HF_XET_HIGH_PERFORMANCE HF_XET_NUM_CONCURRENT_RANGE_GETS

    NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT NCCL_BUFFSIZE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE
    NCCL_CUMEM_HOST_ENABLE NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_DISABLE NCCL_IB_GID_INDEX
    NCCL_IB_HCA NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC NCCL_IB_TIMEOUT
    NCCL_IGNORE_CPU_AFFINITY NCCL_LAUNCH_MODE NCCL_MAX_CTAS NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MIN_NCHANNELS
    NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_NSOCKS_PERTHREAD NCCL_NTHREADS NCCL_NVLS_ENABLE NCCL_P2P_DISABLE
    NCCL_P2P_LEVEL NCCL_PROTO NCCL_SHM_DISABLE NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS

    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_BLOCKING_WAIT
    TORCH_NCCL_CUDA_EVENT_CACHE TORCH_NCCL_DESYNC_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_ENABLE_MONITORING
    TORCH_NCCL_ENABLE_TIMING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_HIGH_PRIORITY TORCH_NCCL_NAN_CHECK
    TORCH_NCCL_PROPAGATE_ERROR TORCH_NCCL_RETHROW_CUDA_ERRORS TORCH_NCCL_TRACE_BUFFER_SIZE
    TORCH_NCCL_USE_COMM_NONBLOCKING TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC

    TRACKIO_PROJECT

    VLLM_ALLOW_LONG_MAX_MODEL_LEN VLLM_ATTENTION_BACKEND VLLM_BATCH_INVARIANT VLLM_CONFIGURE_LOGGING
    VLLM_CPU_KVCACHE_SPACE VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND VLLM_DISABLE_COMPILE_CACHE
    VLLM_DO_NOT_TRACK VLLM_ENABLE_V1_MULTIPROCESSING VLLM_ENGINE_ITERATION_TIMEOUT_S
    VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS VLLM_FLASH_ATTN_VERSION VLLM_LOGGING_LEVEL VLLM_MARLIN_USE_ATOMIC_ADD
    VLLM_NO_USAGE_STATS VLLM_RPC_TIMEOUT VLLM_SKIP_P2P_CHECK VLLM_USE_DEEP_GEMM VLLM_USE_FLASHINFER_SAMPLER
    VLLM_USE_TRITON_FLASH_ATTN VLLM_USE_V1 VLLM_WORKER_MULTIPROC_METHOD

    WANDB_CONSOLE WANDB_DISABLED WANDB_DISABLE_CODE WANDB_DISABLE_GIT WANDB_HTTP_TIMEOUT WANDB_INIT_TIMEOUT
    WANDB_JOB_TYPE WANDB_LOG_MODEL WANDB_MODE WANDB_NAME WANDB_NOTES WANDB_PROJECT WANDB_QUIET WANDB_RESUME
    WANDB_RUN_GROUP WANDB_RUN_ID WANDB_SILENT WANDB_TAGS WANDB_WATCH
    """.split()
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines.

    Args:
        path: The file.

    Returns:
        Values by key.

    Raises:
        UserError: The path is a folder, or the file is not YAML, is empty, or contains no keys or the same key twice.
        OSError: The file cannot be read.
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
        raise UserError(f"{path} must contain one `key: value` per line, got {found}.")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: key {strange[0]!r} is not text. Put it in quotes, or remove it.")
    return content


@lru_cache(maxsize=1)
def _loader():
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a repeated key; YAML would silently keep the last one."""

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
        UserError: A variable is not allowed. The message names it.
    """
    if env is None:
        return
    if not isinstance(env, dict):
        raise UserError(f"{path}: env must contain one `NAME: value` per line, got {env!r}.")
    for name, value in env.items():
        if name not in ENV_NAMES:
            raise UserError(
                f"{path}: env may not set {name!r}, because it can run other code, move files or send data elsewhere. "
                "To set it anyway, remove it here and `export` it in the shell. recipes/README.md lists the allowed "
                "variables."
            )
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise UserError(f"{path}: env {name} must be text or a number, got {value!r}.")


def check_recipe(path: str, recipe: dict, method: str) -> None:
    """Refuse a recipe with a key that is not an option of its method, or with a value of the wrong type.

    Args:
        path: The recipe's path, for messages.
        recipe: Its content.
        method: The recipe's method.

    Raises:
        UserError: A key or value is wrong, or the method cannot be used. The message names the key and suggests a fix.
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
    """Refuse an unknown option, or a value of the wrong type, on the command line.

    Raises:
        UserError: An option or value is wrong. The message names it and suggests a fix.
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
    """Read the method before everything else, because it decides which options exist.

    An option takes precedence over the recipe, and the recipe over the default.

    Returns:
        The method, and the recipe's path or None.

    Raises:
        UserError: The method does not exist, or the recipe cannot be read.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--method")
    peek.add_argument("--config")
    if argv.count("--config") > 1:
        raise UserError("--config appears more than once. Keep one recipe, and give the other settings as options.")
    found, _ = peek.parse_known_args(argv)
    recipe = read_yaml(found.config) if found.config is not None else {}
    method = found.method or recipe.get("method", "capo")
    if method not in list(METHODS):  # a list, because a recipe's value may be unhashable
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
            metadata={
                "help": f"Training method: {', '.join(METHODS)}, or your own trainer as package.module:Trainer."
            },
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
                "help": "Let accuracy_reward repair `\\frac13`, `2\\sqrt3` and `\\boxed 7`, which otherwise count as "
                "wrong."
            },
        )

    config_class = trainer_of(method).config_class
    classes: Any = (TrainArguments, config_class, ModelConfig, DataArguments, DatasetMixtureConfig)
    parser: Any = TrlParser(
        classes,
        prog="trl-capo train",
        allow_abbrev=False,
    )
    parser.error = _refuse  # argparse would print hundreds of lines of usage first
    return parser


def parse(parser, argv: list[str]) -> tuple:
    """Parse a command line and its recipe into configurations.

    Raises:
        UserError: A configuration refuses its values.
    """
    try:
        return parser.parse_args_and_config(argv)
    except UserError:
        raise
    except ValueError as error:  # the user chose the values that a configuration refuses
        raise UserError(str(error)) from error


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def resolved_options(argv: list[str], method: str, config_path: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The options of a run that differ from their defaults, in the form of a recipe.

    Options are recorded as the user gave them, before the configuration derives others, because TRL refuses some
    derived options next to the options they come from.

    Args:
        argv: Words of the command line after `trl-capo train`, with `--config FILE` as two words.
        method: Name of the method.
        config_path: The recipe's path, or None.

    Returns:
        Options by name, `method` first, without secrets and without `resume_from_checkpoint`; and the names of the
        secrets that were left out.
    """
    parser = make_parser(method)
    defaults = vars(parser.parse_args([]))
    words: list[str] = list(argv)
    environment: dict[str, Any] = {}
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
