"""Recipes and options are checked without imports, exactly as the parser would."""

import re
import subprocess
import sys

import pytest

from trl_capo import cli, options, recipe
from trl_capo.files import check_names
from trl_capo.methods import METHODS
from trl_capo.recipe import make_parser


@pytest.mark.parametrize("method", METHODS)
def test_the_options_read_from_the_source_are_those_of_the_parser(method):
    parser = {action.dest for action in make_parser(method)._actions} - {"help"}
    assert set(recipe.known_options(method)) == parser


def test_a_source_that_cannot_be_followed_refuses_nothing(monkeypatch):
    assert options.option_annotations("no_such_package.module:Class") is None
    assert options.option_annotations("trl_capo.errors:Missing") is None
    monkeypatch.setattr(options, "option_annotations", lambda name: None)
    recipe.check_options(["--anything", "1"], "capo")
    recipe.check_recipe("x.yaml", {"anything": 1}, "capo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must contain one `key: value` per line, got nothing"),
        ("- tau", "must contain one `key: value` per line, got list"),
        ("tau: [1", "is not valid YAML"),
        ("tau: 1\ntau: 2", "'tau' appears twice"),
        ("model_init_kwargs: {a: 1, a: 2}", "'a' appears twice"),
        ("5: 1", "key 5 is not text"),
        ("taau: 1", "unknown key 'taau'. Did you mean 'tau'?"),
        ("tau: high", "tau must be a number, got 'high'"),
        ("tau: [1]", "tau must be a number, got [1]"),
        ("tau: true", "tau must be a number, got True"),
        ("max_steps: 2.5", "max_steps must be a whole number, got 2.5"),
        ("max_steps:", "max_steps must be a number, got None"),
        ("use_cpu: perhaps", "use_cpu must be true or false, got 'perhaps'"),
        ("output_dir: [a]", "output_dir must be text, got ['a']"),
        ("method: grpo\ntau: 1", "unknown key 'tau'. It is an option of capo, not of grpo"),
        ("method: [capo]", "method must be one of capo"),
        ("method:", "method must be one of capo"),
        ("baseline: a\nmethods: {}", "is a plan for `trl-capo compare`"),
        ("env: {PATH: /tmp}", "env may not set 'PATH'"),
        ("env: [a]", "env must contain one `NAME: value` per line"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-capo train: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tua", "1"], "unknown option --tua. Did you mean '--tau'?"),
        (["--tau", "a"], "--tau must be a number, got 'a'"),
        (["--max-steps=2.5"], "--max-steps must be a whole number, got '2.5'"),
        (["--method", "grpo", "--tau", "1"], "unknown option --tau. It is an option of capo, not of grpo"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config appears more than once"),
        (["--config", "/"], "/ is a folder"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: No such file"),
    ],
)
def test_mistyped_options_are_refused_before_heavy_imports(words, message):
    code = (
        "import sys; from trl_capo import cli; code = cli.main(['train', *sys.argv[1:]]); "
        "print([m for m in ('torch', 'trl', 'transformers', 'datasets') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1e-6", "float"),  # YAML reads it as text, argparse as a number
        (1, "float"),
        (100.0, "int"),
        (None, "int | None"),
        ("false", "bool"),
        (True, "str | None"),  # resume_from_checkpoint: true
        ({"a": 1}, "dict | str | None"),
        ("x", "list[str]"),
    ],
)
def test_values_that_work_pass(value, annotation):
    assert options.value_problem(value, annotation) is None


def test_every_shipped_recipe_passes(repository):
    paths = list((repository / "recipes").rglob("config_*.yaml"))
    assert paths
    for path in paths:
        content = recipe.read_yaml(str(path))
        recipe.check_recipe(str(path), content, content.get("method", "capo"))


@pytest.mark.parametrize(
    "name",
    "PATH LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONSTARTUP HOME HTTPS_PROXY HF_TOKEN HF_TOKEN_PATH HF_ENDPOINT "
    "WANDB_API_KEY WANDB_BASE_URL NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN NCCL_CONF_FILE VLLM_PLUGINS VLLM_API_KEY "
    "CUDA_INJECTION64_PATH TRL_CAPO_PARENT HF_DATASETS_TRUST_REMOTE_CODE hf_token "
    "VLLM_ALLOW_INSECURE_SERIALIZATION WANDB_X_PROXIES WANDB_PROXIES WANDB_X_EXTRA_HTTP_HEADERS WANDB_SERVICE "
    "WANDB_CONFIG_DIR WANDB_DIR WANDB_ENTITY NCCL_COMM_ID NCCL_TOPO_FILE VLLM_DP_MASTER_IP VLLM_USE_MODELSCOPE "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_CACHE_ROOT VLLM_CONFIG_ROOT TRACKIO_SPACE_ID TRACKIO_DATASET_ID "
    "TRACKIO_BUCKET_ID HF_HOME HF_HUB_CACHE TORCH_NCCL_DEBUG_INFO_TEMP_FILE".split(),
)
def test_variables_that_run_code_or_send_data_are_refused(name):
    with pytest.raises(ValueError, match=f"env may not set '{name}'.*export"):
        recipe.check_env("x.yaml", {name: "1"})


def test_variables_that_tune_or_name_a_run_pass():
    names = "WANDB_PROJECT WANDB_MODE TRACKIO_PROJECT HF_HUB_OFFLINE NCCL_DEBUG NCCL_SOCKET_IFNAME OMP_NUM_THREADS"
    names += " CUDA_VISIBLE_DEVICES TOKENIZERS_PARALLELISM PYTORCH_CUDA_ALLOC_CONF VLLM_ATTENTION_BACKEND"
    names += " WANDB_NAME WANDB_RUN_GROUP WANDB_TAGS WANDB_NOTES WANDB_SILENT HF_DATASETS_OFFLINE NCCL_P2P_DISABLE"
    names += " HF_HUB_DISABLE_TELEMETRY HF_HUB_ENABLE_HF_TRANSFER NCCL_IB_DISABLE TORCH_NCCL_ASYNC_ERROR_HANDLING"
    names += " VLLM_USE_V1 VLLM_LOGGING_LEVEL VLLM_CPU_KVCACHE_SPACE"
    recipe.check_env("x.yaml", dict.fromkeys(names.split(), 1))


def test_variables_are_those_of_the_readme(repository):
    text = (repository / "recipes" / "README.md").read_text(encoding="utf-8")
    _, start, listed = text.partition("`env:` may set only")
    listed = listed[listed.index("\n- ") :].partition("\n#")[0]
    assert start and set(re.findall(r"`([A-Z0-9_]+)`", listed)) == recipe.ENV_NAMES


def test_names_of_models_become_folders():
    from trl_capo.evaluation.run import folder_names

    assert folder_names(["a/x", "b/x", "my model (v2)"]) == ["x", "x-2", "my model (v2)"]
    with pytest.raises(ValueError, match="models: '' is empty"):
        folder_names(["/"])
    with pytest.raises(ValueError, match="'Ａ' become the same file or folder"):
        check_names("names", ["a", "Ａ"])  # equal after Unicode's compatibility normalisation
