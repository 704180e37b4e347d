"""Every recipe parses with the installed TRL and says what it is meant to say."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.data.standins import make_repositories, question
from trl_capo.compare.demo import OWN as DEMO_OWN
from trl_capo.compare.demo import SHARED as DEMO_SHARED
from trl_capo.compare.plan import read_plan, recipe
from trl_capo.recipe import make_parser
from trl_capo.scripts.train import main


RECIPES = sorted(path for path in Path("recipes").rglob("config_*.yaml"))


def parse(path: Path):
    script, training, model, *_ = parse_all(path)
    return script, training, model


def parse_all(path: Path):
    method = yaml.safe_load(path.read_text())["method"]
    # bf16 recipes are for GPUs; on a machine without one the parser needs to hear that the CPU is meant.
    arguments = ["--config", str(path), "--use_cpu", "true"]
    return make_parser(method).parse_args_and_config(arguments)


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_parses(path, monkeypatch):
    from trl_capo.preflight.checks import check_save_steps

    script, training, model = parse(path)
    assert path.parent.name == script.method
    assert model.model_name_or_path and script.dataset_name and training.output_dir.startswith("runs/")
    check_save_steps(training)


FULL = [path for path in RECIPES if path.name == "config_deepscaler.yaml"]


@pytest.mark.parametrize("path", FULL, ids=str)
def test_paper_layout(path):
    """128 prompts x 8 completions on 8 GPUs, two updates a generation, the paper's number of rollout batches."""
    script, training, _ = parse(path)
    rows = 8 * training.per_device_train_batch_size
    assert rows * training.steps_per_generation == 128 * 8
    assert rows * training.gradient_accumulation_steps == 64 * 8
    assert training.max_steps == (800 if "Math-7B" in str(path) else 1200)
    assert (training.lr_scheduler_type, training.learning_rate, training.loss_type) == ("constant", 1e-6, "grpo")
    assert training.num_generations_eval == 16
    if script.method == "capo" and "Qwen2.5" in str(path):
        assert (training.tau, training.ref_ppl_low, training.ref_ppl_high) == (
            0.6 if "1.5B" in str(path) else 0.5,
            1.05,
            2.5,
        )


OWN = {  # what may differ between the methods of a comparison
    *("method", "output_dir", "run_name", "hub_model_id", "scale_rewards", "epsilon", "epsilon_high"),
    *("importance_sampling_level", "ref_ppl_mask", "ref_ppl_quantiles", "ref_model_dtype", "tau", "tau_unit"),
    # SimKO needs its memory for logits: fewer rows, more of them accumulated.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
}


def test_recipes_of_a_model_differ_in_the_method_only():
    """All that two methods both have is the same, defaults included, or the comparison would not compare them."""
    for folder in ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B", "Qwen3-1.7B"):
        paths = [path for path in FULL if folder in str(path)]
        parsed = {path.parent.name: [vars(part) for part in parse_all(path)] for path in paths}
        options = {method: {k: v for part in parts for k, v in part.items()} for method, parts in parsed.items()}
        for method, given in options.items():
            for name in (set(given) & set(options["grpo"])) - OWN:
                if not name.startswith(("_", "logging_dir", "deepspeed", "distributed_state")):
                    assert str(given[name]) == str(options["grpo"][name]), (folder, method, name)


SHAPES = {
    "Qwen2.5-Math-1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2),
    "Qwen2.5-Math-7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4),
    "Qwen3-1.7B": dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8),
}


@pytest.fixture(scope="module")
def stand_ins(tiny_model, tmp_path_factory):
    """Configurations of the models in their true shapes, without weights, and data of the shape of DeepScaleR."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen3Config

    folder = tmp_path_factory.mktemp("stand-ins")
    for name, shape in SHAPES.items():
        kind = (
            dict(max_position_embeddings=4096) if "2.5" in name else dict(head_dim=128, max_position_embeddings=32768)
        )
        vocabulary = dict(
            vocab_size=152064 if "Math-7B" in name else 151936, tie_word_embeddings="Math-7B" not in name
        )
        config = (Qwen2Config if "2.5" in name else Qwen3Config)(num_hidden_layers=28, **shape, **kind, **vocabulary)
        config.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / name)
    repository = make_repositories(folder / "data") / "agentica-org/DeepScaleR-Preview-Dataset"
    for file in repository.glob("*.jsonl"):  # a generation of these recipes takes 128 prompts
        rows = [{"problem": question(i), "answer": str(2 * i), "solution": ""} for i in range(1000, 1140)]
        file.write_text("\n".join([file.read_text(), *map(json.dumps, rows)]))
    return folder


ACCELERATE = {"Qwen2.5-Math-1.5B": "zero2", "Qwen2.5-Math-7B": "zero3", "Qwen3-1.7B": "zero2"}
PARAMETERS = {"Qwen2.5-Math-1.5B": 1_543_714_304, "Qwen2.5-Math-7B": 7_615_616_512, "Qwen3-1.7B": 1_720_574_976}


@pytest.mark.filterwarnings("ignore:.*rows, .* were expected", "ignore:Dropping")
@pytest.mark.parametrize("path", [path for path in RECIPES if "Qwen" in str(path)], ids=str)
def test_dry_run(path, stand_ins, repository, monkeypatch, capsys):
    """Every recipe, the model's true shape, without GPU and network; and its README says what it says."""
    folder, lora = path.parent.parent.name, "lora" in path.name
    monkeypatch.setenv("TRL_CAPO_DATA", str(stand_ins / "data"))
    options = ["--model_name_or_path", str(stand_ins / folder), "--num_train_prompts", "160"]
    options += ["--num_validation_prompts", "8"]
    if "24gb" in path.name:
        options += ["--gpu_memory", "24"]
    if not lora:
        options += ["--accelerate_config", f"recipes/accelerate_configs/{ACCELERATE[folder]}.yaml"]
    main(["--config", str(path), *options, "--dry-run"])
    printed = capsys.readouterr().out
    assert "160 to train on, 8 to evaluate on, each with at most 1,024 tokens" in printed
    trained = re.search(r"([\d,]+) parameters, ([\d,]+) of them trained", printed)
    numbers, of_them = (int(number.replace(",", "")) for number in trained.groups())
    assert numbers - (of_them if lora else 0) == PARAMETERS[folder]
    assert (of_them == numbers) == (not lora)
    times = 6 if lora or "Math-7B" not in folder else 4
    assert f"8 prompts x 16 = {4 if lora else 1} batches, {times} times" in printed
    prompts = (32, 600) if lora else (128, 400 if "Math-7B" in folder else 600)
    assert f"for each of {prompts[0]} prompts" in printed and f"= {prompts[1]} rollout batches" in printed
    assert "⚠️" not in printed
    total = float(re.search(r"total +([\d.]+)", printed).group(1))
    told = Path(f"recipes/{folder}/README.md").read_text()
    if path.parent.name in ("capo", "simko"):
        assert f"{total:.0f} GiB" in told, total


LANGUAGE = [path for path in RECIPES if "SmolLM2" in str(path)]


@pytest.mark.parametrize("path", LANGUAGE, ids=str)
def test_language_recipe(path):
    """All methods see as many generations of 8 prompts x 8 completions."""
    script, training, model = parse(path)
    assert model.model_name_or_path == f"runs/smollm2-{script.dataset_name}"
    assert training.generation_batch_size == 64 and training.num_generations == 8
    assert training.max_steps * training.gradient_accumulation_steps / training.steps_per_generation == 40
    assert (training.generation, training.mean_logps_from) == ("compact", "sampler")


@pytest.mark.parametrize("path", LANGUAGE, ids=str)
def test_dry_run_of_language_recipe(path, capsys):
    pytest.importorskip("reasoning_gym")
    script, _, model = parse(path)
    if not Path(model.model_name_or_path).exists():
        pytest.skip(f"{model.model_name_or_path} is not there: python -m trl_capo.scripts.language_base makes it")
    main(["--config", str(path), "--dry-run"])
    assert "for each of 8 prompts" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*rows, .* were expected", "ignore:Dropping")
@pytest.mark.parametrize("method", ["grpo", "capo", "gspo", "codapo", "cde", "simko"])
def test_dry_run_of_the_comparison(method, stand_ins, tmp_path, monkeypatch, capsys):
    """One GPU a run: 32 prompts, two updates a generation, GSPO with its own bounds."""
    monkeypatch.setenv("TRL_CAPO_DATA", str(stand_ins / "data"))
    plan = read_plan("recipes/Qwen2.5-Math-1.5B/compare.yaml")
    assert set(plan.methods) == {"grpo", "capo", "gspo", "codapo", "cde", "simko"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(plan, method, 0, "runs/compare"), sort_keys=False))
    main(
        ["--config", str(path), "--model_name_or_path", str(stand_ins / "Qwen2.5-Math-1.5B"), "--dry-run"]
        + ["--num_train_prompts", "160"]
    )
    printed = capsys.readouterr().out
    assert "for each of 32 prompts" in printed and "= 200 rollout batches" in printed and "⚠️" not in printed
    total = float(re.search(r"total +([\d.]+)", printed).group(1))
    if method in ("capo", "simko"):
        assert f"{total:.0f} GiB" in Path("recipes/Qwen2.5-Math-1.5B/README.md").read_text(), total
    _, training, *_ = parse_all(path)
    assert (training.epsilon, training.epsilon_high) == ((3e-4, 4e-4) if method == "gspo" else (0.2, None))


@pytest.mark.parametrize("method", ["capo", "grpo"])
def test_arithmetic_recipe_is_the_demo(method):
    _, training, model = parse(Path(f"recipes/arithmetic/{method}/config_demo.yaml"))
    options = DEMO_SHARED | DEMO_OWN[method]
    assert model.model_name_or_path == "arithmetic-base"
    for name, value in options.items():
        if name != "report_to":
            assert getattr(training, name) == value, name
