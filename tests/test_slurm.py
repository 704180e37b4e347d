"""The Slurm scripts run with stand-ins for Slurm's commands; what they would launch is parsed by its own parsers."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from trl.scripts.vllm_serve import ScriptArguments, build_command

from trl_capo.recipe import make_parser


SCRIPTS = sorted(Path("recipes/slurm").glob("*.slurm"))
# srun runs its command once a task, each on a node of its own; accelerate and vllm write down what they were told.
SRUN = """
import os, signal, subprocess, sys
arguments = sys.argv[1:]
options = {}
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    options[name] = value
hosts = options["--nodelist"].split(",")
assert len(hosts) == int(options["--nodes"]) == int(options["--ntasks"])
tasks = [
    subprocess.Popen(arguments, env={**os.environ, "SLURM_PROCID": str(rank), "HOST": host})
    for rank, host in enumerate(hosts)
]
signal.signal(signal.SIGTERM, lambda *received: [task.kill() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
RECORDER = """
import json, os, sys, time
name = os.path.basename(sys.argv[0]).removesuffix(".py")
record = os.path.join(os.environ["RECORDS"], name + "-" + os.environ["HOST"] + ".json")
with open(record + ".partial", "w") as file:
    json.dump(dict(arguments=sys.argv[1:], dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE")), file)
os.rename(record + ".partial", record)
if name == "vllm":
    time.sleep(60)  # a server does not end by itself
elif "server" in sys.argv:  # training cannot end before its server has begun
    while not any(file.startswith("vllm-") and file.endswith(".json") for file in os.listdir(os.environ["RECORDS"])):
        time.sleep(0.05)
if os.environ.get("FAILS") == os.environ["HOST"]:
    sys.exit(3)
"""
SCONTROL = """#!/bin/sh
for host in $SLURM_JOB_NODELIST; do echo $host; done
"""


def submit(script: Path, folder: Path, num_nodes: int, *options: str, **environment) -> tuple[int, str, dict]:
    """Exit code, what was said, and what each command on each host was told."""
    commands = {"scontrol": SCONTROL}
    for name, program in {"srun": SRUN, "accelerate": RECORDER, "vllm": RECORDER}.items():
        path = folder / f"{name}.py"
        path.write_text(program)
        # The interpreter's path may hold a space, which a script's first line cannot quote.
        commands[name] = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(path))} "$@"\n'
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RECORDS": str(folder),
        "SLURM_JOB_NODELIST": " ".join(f"node{i}" for i in range(num_nodes)),
        "SLURM_NNODES": str(num_nodes),
        "SLURM_JOB_ID": "1234567",
        **environment,
    }
    run = subprocess.run(
        ["bash", str(script), *options],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    return run.returncode, run.stderr, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def check_launch(arguments: list[str], rank: int, num_nodes: int) -> list[str]:
    """Accelerate understands it; returns what goes to the training script."""
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (parsed.machine_rank, parsed.num_machines, parsed.num_processes) == (rank, num_nodes, 8 * num_nodes)
    assert parsed.main_process_ip == "node0" and 20000 <= parsed.main_process_port < 40000
    assert parsed.rdzv_backend == "static", "ranks are those that Slurm gives"
    assert parsed.module and parsed.training_script == "trl_capo.scripts.train"
    return parsed.training_script_args


def check_training(arguments: list[str], num_processes: int):
    """The recipe is there and every option exists; a generation is the paper's on any number of processes."""
    recipe = Path(arguments[arguments.index("--config") + 1])
    method = yaml.safe_load(recipe.read_text())["method"]
    parser = make_parser(method)
    script, training, model, *_ = parser.parse_args_and_config([*arguments, "--use_cpu", "true"])
    rows = training.per_device_train_batch_size * num_processes
    assert rows * training.steps_per_generation == 128 * 8
    assert rows * training.gradient_accumulation_steps == 64 * 8
    assert training.resume_from_checkpoint == "true"
    return script, training, model


@pytest.mark.parametrize("path", [*SCRIPTS, Path("recipes/slurm/common.sh")], ids=lambda path: path.name)
def test_bash_reads_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("num_nodes", "model", "launcher"),
    [(1, "1.5B", "fsdp2"), (2, "1.5B", "zero2"), (8, "7B", "fsdp2"), (4, "7B", "ddp")],
)
def test_train(tmp_path, num_nodes, model, launcher):
    code, said, records = submit(
        Path("recipes/slurm/train.slurm"),
        tmp_path,
        num_nodes,
        "--tau",
        "0.4",
        MODEL=f"Qwen2.5-Math-{model}",
        ACCELERATE_CONFIG=launcher,
    )
    assert code == 0, said
    assert set(records) == {f"accelerate-node{i}" for i in range(num_nodes)}
    for rank in range(num_nodes):
        command, *arguments = records[f"accelerate-node{rank}"]["arguments"]
        assert command == "launch" and f"recipes/accelerate_configs/{launcher}.yaml" in arguments
        script_arguments = check_launch(arguments, rank, num_nodes)
        _, training, model_arguments = check_training(script_arguments, 8 * num_nodes)
        assert model in model_arguments.model_name_or_path
        assert (training.tau, training.use_vllm, training.vllm_mode) == (0.4, True, "colocate")


def test_train_with_a_server(tmp_path):
    code, said, records = submit(Path("recipes/slurm/train_vllm_server.slurm"), tmp_path, 3)
    assert code == 0, said
    assert set(records) == {"accelerate-node0", "accelerate-node1", "vllm-node2"}
    for rank in range(2):
        script_arguments = check_launch(records[f"accelerate-node{rank}"]["arguments"][1:], rank, 2)
        _, training, model = check_training(script_arguments, 16)
        assert (training.vllm_mode, training.vllm_server_host) == ("server", "node2")
        assert training.vllm_server_timeout >= 600

    server = records["vllm-node2"]
    options = server["arguments"]
    assert server["dev_mode"] == "1" and options[:2] == ["serve", model.model_name_or_path]
    assert options[options.index("--port") + 1] == str(training.vllm_server_port)
    assert options[options.index("--max-model-len") + 1] == str(training.vllm_max_model_length)
    # What TRL itself would add.
    imposed = build_command(ScriptArguments(model=model.model_name_or_path))
    imposed = imposed[imposed.index("--weight-transfer-config") :]
    assert len(imposed) == 6 and [*options[-6:]] == imposed
    known = {word for word in build_command(ScriptArguments("m", max_model_len=1)) if word.startswith("--")}
    assert {word for word in options if word.startswith("--")} <= known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_node_that_fails_ends_the_job(tmp_path, script):
    code, _, records = submit(script, tmp_path, 2, FAILS="node0")
    assert code == 3


@pytest.mark.parametrize(
    ("num_nodes", "environment", "complaint"),
    [
        (2, {"MODEL": "Qwen3"}, "recipes/Qwen3/capo/config_deepscaler.yaml does not exist"),
        (3, {}, "cannot be divided among 24"),
        (2, {"MODEL": "arithmetic", "CONFIG": "demo"}, "has no gradient_accumulation_steps"),
    ],
)
def test_what_cannot_work_is_said(tmp_path, num_nodes, environment, complaint):
    code, said, records = submit(Path("recipes/slurm/train.slurm"), tmp_path, num_nodes, **environment)
    assert code == 2 and complaint in said and not records


def test_a_server_needs_a_second_node(tmp_path):
    code, said, records = submit(Path("recipes/slurm/train_vllm_server.slurm"), tmp_path, 1)
    assert code == 2 and "sbatch --nodes=2" in said and not records
