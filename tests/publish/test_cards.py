"""A card: the right paper or none, a name that works, a real question, the last figures; and nothing breaks out."""

import ast
import json
import shutil
import subprocess

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard

from tests.helpers import TOKEN, prompt_dataset, save_tiny_model, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageTrainer, cli
from trl_capo.markdown import code_block
from trl_capo.methods import METHODS, trainer_of
from trl_capo.publish.card import complete_card, example_question, final_figures, put_section


PAPERS = {
    "capo": "2604.12632",
    "grpo": "2402.03300",  # where GRPO is from
    "gspo": "2507.18071",
    "codapo": "2606.07950",
    "cde": "2509.09675",
    "simko": "2510.14807",
    "capo_simko": None,
    "conspo": "2605.12969",
    "maxrl": "2602.02710",
    "c2gspg": "2509.23129",
    "ace": "2602.21420",
    "rlsr": "2607.03528",
    "self_aligned": "2509.05489",
    "progrpo": "2602.05281",
}


def question_of(card: str) -> str:
    """The question of the Python example, as Python reads it."""
    block = card.split("```python\n")[1].split("\n```")[0]
    names = {node.targets[0].id: node.value for node in ast.parse(block).body if isinstance(node, ast.Assign)}
    return ast.literal_eval(names["question"])


def model_of(card: str) -> str:
    block = card.split("```python\n")[1].split("\n```")[0]
    call = next(node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call) and node.keywords)
    return next(word.value.value for word in call.keywords if word.arg == "model")


def asked(card: str) -> list[str]:
    """The words of the `trl-capo answer` command, as a shell reads them."""
    command = card.split("```bash\n")[1].split("\n```")[0]
    script = f'trl-capo() {{ printf "%s\\0" "$@"; }}; {command}'
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True).stdout
    return output.split("\0")[:-1]


@pytest.mark.parametrize("method", METHODS)
def test_paper_of_a_method(method):
    assert trainer_of(method)._paper.get("id") == PAPERS[method]


def test_own_method_has_no_paper_of_its_parent():
    class MineTrainer(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            return None

    class Named(CAPOTrainer):
        _name = "Other"

    class Logging(CAPOTrainer):
        def log(self, *args, **kwargs):
            super().log(*args, **kwargs)

    class Cited(GroupAdvantageTrainer):
        _name, _paper = "Cited", {"title": "Mine", "id": "2600.00001"}

    assert (MineTrainer._name, MineTrainer._paper) == ("Mine", {})
    assert (Named._name, Named._paper) == ("Other", {})
    assert Logging._paper is CAPOTrainer._paper and Logging._name == "CAPO"
    assert Cited._paper["id"] == "2600.00001"


def test_card_of_an_own_method(tiny_model, tmp_path):
    class MineTrainer(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            return groups.rewards - groups.rewards.mean(dim=1, keepdim=True)

    trainer = tiny_trainer(MineTrainer, tiny_model, tmp_path, dataset=prompt_dataset(8))
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "trained with Mine." in card and "DeepSeekMath" not in card and "2402.03300" not in card
    assert "Cite Mine" not in card and "Cite TRL" in card


@pytest.mark.parametrize("way", ["push_to_hub", "save and push", "checkpoint", "other folder"])
@pytest.mark.parametrize("lora", [False, True])
def test_card_on_every_way(hub, tiny_model, tmp_path, way, lora):
    """A script without a recipe: repository, question and figures are there, and nothing of the template's blanks."""
    from peft import LoraConfig

    run = tmp_path / "run"
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, ref_ppl_mask=False, dataset=prompt_dataset(8))
    options |= {"hub_model_id": "me/mine"} if way == "push_to_hub" else {}
    options |= {"peft_config": LoraConfig(task_type="CAUSAL_LM")} if lora else {}
    trainer = tiny_trainer(CAPOTrainer, tiny_model, run, **options)
    trainer.train()
    folder = {"checkpoint": run / "checkpoint-1", "other folder": tmp_path / "other"}.get(way, run)
    if way == "push_to_hub":
        trainer.push_to_hub()
    else:
        if way != "checkpoint":
            trainer.save_model(None if folder == run else str(folder))
            before = (folder / "README.md").read_text()
            assert model_of(before) == folder.name and asked(before)[:2] == ["answer", folder.name]
        assert cli.main(["push", str(folder), "--repo_id", "me/mine"]) == 0
    card = hub.repositories["me/mine"]["README.md"].decode()
    assert model_of(card) == "me/mine" and asked(card) == ["answer", "me/mine", "7+0"]
    assert question_of(card) == "7+0" and "time machine" not in card and "None" not in card
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    last = steps[0] if way == "checkpoint" else steps[-1]
    assert f"| training | Mean reward | {last['reward']:.4g} | {last['step']} |" in card
    assert "| training | AUC within |" in card and "More Information Needed" not in card
    assert ("2604.12632" in card) == (way in ("push_to_hub", "save and push"))
    assert complete_card(folder, repo_id="me/mine") == complete_card(folder, repo_id="me/mine")
    assert ModelCard(card).data.library_name in ("transformers", "peft")


EVIL = (
    "a|b `c`\n```\n---\n<script>alert('1')</script> \"q\" \\n $HOME $(id) {{ x }} {% y %}\n"
    "<!-- trl-capo: end of use --> ![x](../../secret.png) \u2028\x85\x1b[0m ü 'end"
)


def test_question_that_wants_to_break_out(tmp_path):
    save_tiny_model(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"method": "capo", "system_prompt": EVIL}))
    data = {"name": "/x/[a](b)|<i>", "split": "train", "rows": 1, "sha256_of_rows": "ab", "hub": None}
    record = {
        "versions": {},
        "git": {},
        "world_size": 1,
        "device": "cpu",
        "model": {"name": "/a/<b>|", "revision": None, "commit": None, "config_sha256": "ef"},
        "data": {"train": data},
    }
    (tmp_path / "run" / "reproduction.json").write_text(json.dumps(record))
    card = complete_card(tmp_path / "run", repo_id="me/x", question=EVIL)
    assert question_of(card) == EVIL and asked(card) == ["answer", "me/x", EVIL]
    assert ModelCard(card).data.to_dict() == {"library_name": "transformers", "tags": ["trl", "trl-capo"]}
    assert [card.count(mark) for mark in ("<!-- trl-capo: use -->", "<!-- trl-capo: end of use -->")] == [1, 1]
    prose = card.split("## How it was trained")[1].split("````yaml")[0]
    assert "<b>" not in prose.replace("\\<b\\>", "") and "](b)" not in prose
    recipe = card.split("````yaml\n")[1].split("\n````")[0]  # a longer fence than the one in the prompt
    assert yaml.safe_load(recipe)["method"] == "capo"
    (tmp_path / "run" / "README.md").write_text(card)
    assert complete_card(tmp_path / "run", repo_id="me/x") == card  # also a second time


def test_secret_in_a_card(tmp_path):
    save_tiny_model(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(f"# Mine\n\nLog in with {TOKEN}, api_key=geheim.\n")
    (tmp_path / "run" / "calibration.md").write_text(f"at https://me:geheim@example.com/{TOKEN}\n")
    card = complete_card(tmp_path / "run", question=f"is {TOKEN} mine?")
    assert TOKEN not in card and "geheim" not in card and "# Mine" in card


def test_files_of_an_earlier_version_go_up_without_secrets(hub, tmp_path):
    run = tmp_path / "run"
    save_tiny_model(run)
    kwargs = json.dumps({"token": "geheim", "revision": "z"})
    (run / "recipe.yaml").write_text(yaml.safe_dump({"method": "capo", "model_init_kwargs": kwargs, "tau": 0.3}))
    (run / "reproduction.json").write_text(json.dumps({"command": f"trl-capo --x={TOKEN}", "versions": {}, "git": {}}))
    shutil.copy(run / "recipe.yaml", tmp_path / "before.yaml")
    record = json.loads((run / "reproduction.json").read_text())
    record |= {"world_size": 1, "device": "cpu", "data": {}, "model": {"name": "m", "config_sha256": "ef"}}
    (run / "reproduction.json").write_text(json.dumps(record))
    assert cli.main(["push", str(run), "--repo_id", "me/x"]) == 0
    files = hub.repositories["me/x"]
    assert not any(secret in content for content in files.values() for secret in (b"geheim", TOKEN.encode()))
    expected = {"method": "capo", "model_init_kwargs": '{"revision": "z"}', "tau": 0.3}
    assert yaml.safe_load(files["recipe.yaml"]) == expected
    assert (run / "recipe.yaml").read_bytes() == (tmp_path / "before.yaml").read_bytes()


def test_last_figures():
    history = [
        {"reward": 0.25, "capo/auc_within": 0.6, "step": 1},
        {"eval_reward": 0.5, "eval_maths_reward": 0.75, "eval_capo/auc_within": None, "step": 1},
        {"reward": 0.5, "capo/auc_within": None, "loss": 1.0, "step": 2},
        {"train_runtime": 3.0, "step": 2},
    ]
    rows = [line for line in final_figures(history).splitlines() if line.startswith("| ") and "Figure" not in line]
    assert rows == [
        "| training | Mean reward | 0.5 | 2 |",
        "| training | AUC within | 0.6 | 1 |",
        "| evaluation | Mean reward | 0.5 | 1 |",
        "| evaluation | AUC within | undefined |  |",
        "| evaluation maths | Mean reward | 0.75 | 1 |",
    ]
    assert final_figures([{"loss": 1.0}]) is None and final_figures([]) is None


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["1+1="], "1+1="),
        (
            [
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "1"},
                    {"role": "assistant", "content": "a"},
                ]
            ],
            "1",
        ),
        ([[{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]], "2"),
        ([[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]], "a b"),
        (["x" * 501, "short"], "short"),
        (["x" * 501], "x" * 500),
        (["", " "], None),
        ([1, 2], None),
    ],
)
def test_question_of_the_training(prompts, expected):
    rows = Dataset.from_dict({"prompt": prompts})
    assert example_question(rows) == expected
    if len(prompts) == 1:
        assert example_question(rows.to_iterable_dataset()) == expected
    assert example_question(Dataset.from_dict({"text": ["x"]})) is None and example_question(None) is None


def test_section_is_replaced_whatever_the_text():
    text = put_section("Mine <2> <1>.", "New <!-- trl-capo: use --> <2>", "<1>", "<3>")
    assert text == "Mine <2> <1>.\n\n<1>\nNew <!- trl-capo: use --> <2>\n<3>\n"
    assert put_section("<3> <1>\nOld\n<3> after", "New", "<1>", "<3>") == "<3> <1>\nNew\n<3> after"


def test_block_of_code_is_not_closed_from_within():
    assert code_block("a\n  ```\nb\n````") == "`````\na\n  ```\nb\n````\n`````"
    assert code_block("tau: 1", "yaml") == "```yaml\ntau: 1\n```"
