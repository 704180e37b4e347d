"""No secret survives, by its name or by its shape; what only looks like one does."""

import copy
import json
import pickle
import timeit

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import config_kwargs, parity_reward, prompt_dataset, recipe_options
from trl_capo import cli
from trl_capo.methods import METHODS
from trl_capo.recipe import make_parser
from trl_capo.redact import STARS, is_secret_name, mask, redact, redact_words, secret_problems


SECRET_NAMES = (
    "hub_token HF_TOKEN HF_TOKEN_2 token TOKEN PGPASSWORD PGPASS SSHPASS DB_PASS apikey api_key APIKEY apiKey "
    "API_KEYS OPENAI_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID private_key ssh-key access_token refreshToken "
    "client_secret Authorization bearer password passwd user_pwd credentials HUGGING_FACE_HUB_TOKEN use_auth_token "
    "WANDB_API_KEY SLACK_WEBHOOK_URL MYSQL_PWD key secrets push_to_hub_token db.password "
    "x-api-key AZURE_STORAGE_CONNECTION_STRING dbpass userpass creds oauth pin otp db_pin X-Amz-Signature"
).split()
PLAIN_NAMES = (
    "pad_token eos_token bos_token unk_token image_token mask_token pad_token_id eos_token_id max_prompt_tokens "
    "tokens num_key_value_heads tokenizer_name tokenizer include_num_input_tokens_seen average_tokens_across_devices "
    "max_new_tokens token_type_ids key_value compass bypass passes pass_at_k monkey keyboard sort_key prompt_key "
    "author additional_special_tokens decoder_start_token_id per_token_logps method tau "
    "secretary secretaries dataloader_pin_memory pin_memory spin opinion trespass signature"
).split()
LETTERS = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0z"
SHAPES = {
    "hub": f"hf_{LETTERS}",
    "openai": f"sk-proj-{LETTERS}",
    "github": f"ghp_{LETTERS}",
    "fine-grained": f"github_pat_{LETTERS}_{LETTERS}",
    "gitlab": f"glpat-{LETTERS}",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "slack": "xoxb-123456789012-abcdefghij",
    "google": f"AIza{LETTERS}{LETTERS}",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
    "wandb": f"wandb_v1_{LETTERS}",
    "bearer": "Bearer abc.def-ghi_jkl",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nAAAA\n-----END OPENSSH PRIVATE KEY-----",
    "url": "postgres://me:p@ss.word@db.example.com/x",
    "slash in a password": "postgres://me:p/ss.word@db.example.com/x",
    "header": "Authorization: token geheim77",
    "option in a command": "trl-capo train --hub_token geheim77 --tau 1",
    "token in a url": f"https://{LETTERS}@github.com/me/x.git",
}
HIDDEN = {
    "slash in a password": "p/ss.word",
    "option in a command": "geheim77",
    "bearer": "abc.def-ghi_jkl",
    "private key": "b3BlbnNzaC1rZXk",
    "url": "p@ss.word",
    "header": "geheim77",
    "token in a url": LETTERS,
}


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_by_its_name(name):
    """Alone, nested, in a list, as JSON in text, in a command and in free text."""
    left_out = []
    options = {"tau": 0.3, "deep": [{"er": {name: "geheim77", "revision": "z"}}], "x": json.dumps({name: "geheim77"})}
    clean = redact({**options, name: "geheim77"}, left_out)
    assert clean == {"tau": 0.3, "deep": [{"er": {"revision": "z"}}], "x": "{}"}
    assert sorted(left_out) == sorted([f"deep.er.{name}", f"x.{name}", name])
    words = [f"--{name}", "geheim77", f"--{name}=geheim77", "--x=" + json.dumps({"a": [{name: "geheim77"}]})]
    assert "geheim77" not in " ".join(redact_words([*words, "--y", json.dumps({name: "geheim77"})]))
    assert redact_words(["--tau", "0.3", f"--{name}", "a", "b", "--x=1"])[-3:] == [STARS, STARS, "--x=1"]
    for text in (
        f"{name}=geheim77",
        f"a {name}=geheim77&b=1",
        f'{{"{name}": "geheim77"}}',
        f"{{'{name}': 'geheim77'}}",
    ):
        assert "geheim77" not in mask(text) and name in mask(text)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_plain_name_stays(name):
    options = {name: "<x>", "deep": [{name: 3}]}
    assert not is_secret_name(name) and redact(options) == options
    assert redact_words([f"--{name}", "x", f"--{name}=y"]) == [f"--{name}", "x", f"--{name}=y"]
    assert mask(f"{name}=abcdef {name}: abcdef") == f"{name}=abcdef {name}: abcdef"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("around", ["{}", "see {} there", "model: '{}'", "--x={}", "(https://a.b/?q={}&c=1)", "[{}]"])
def test_secret_by_its_shape(shape, around):
    text = around.format(SHAPES[shape])
    hidden = HIDDEN.get(shape, SHAPES[shape])
    assert hidden not in mask(text) and STARS in mask(text)
    assert mask(mask(text)) == mask(text)
    assert hidden not in json.dumps(redact({"a": [text, {"b": text}]}))


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/sums@0123456789abcdef0123456789abcdef01234567/train.parquet",
        "git@github.com:me/x.git",
        "hf-internal-testing/tiny-random-Qwen2ForCausalLM",
        "runs/task-something-quite-long-and-harmless-2026",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "0123456789abcdef0123456789abcdef01234567",
        "The key: think first. The secret: practice. A token: 7.",
        "https://huggingface.co/Qwen/Qwen2.5-Math-1.5B",
        "Basic arithmetic for the bearer certificates. Show --tau 0.3 and --max_prompt_tokens 64",
        "http://localhost:8000/x@y",
        "http://localhost:8000/v1",
        '{"min_lr_rate": 0.1}',
        "[0.25, 0.75]",
        "eos_token: <eos>\npad_token_id: 0",
        "The secretary: Anna77777777777. secretary=Anna",
        "Solve for key = 3",
        "Solve for key = 3x + 5, where the secret = y and token = x",
        "Let key=7. The key: 3.14159265358979, or the key: Straightforward thinking.",
        "Enter your login and password here; a password is required.",
        "docker run -u 1000:1000 image",
    ],
)
def test_plain_text_stays(text):
    assert mask(text) == text and redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        f"token: {LETTERS}",
        f"see credential: {LETTERS}, or",
        f"key: '{LETTERS}'",
        "curl -u me:VALUE https://example.com",
        "curl --user 'me:VALUE' https://example.com",
        '{"auth": ["me", "VALUE"]}',
        '{"auth": [\n "me",\n "VALUE"\n]}',
        "auth=(me, VALUE)",
        'password: "a\\"VALUE"',
        "password: 'a\\'VALUE'",
        json.dumps(json.dumps({"password": 'a"VALUE', "tau": 1})),
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nVALUE\n=abcd\n-----END PGP PRIVATE KEY BLOCK-----",
        "https://x.blob.core.windows.net/a?sv=2024&sig=VALUE7%3D&se=1",
        "https://x.s3.amazonaws.com/a?X-Amz-Signature=VALUE",
        "https://discord.com/api/webhooks/1234567/VALUE-x_y",
        "machine huggingface.co login me password VALUE",
        "machine huggingface.co\n  login me\n  password VALUE\n",
        "password VALUE77",
        "url=https%3A%2F%2Fx.y%2F%3Ftoken%3DVALUE",
        "%7B%22token%22%3A%20%22VALUE%22%7D",
        "token = VALUE",
        "my token = VALUE77",
    ],
)
def test_secret_as_tools_write_it(text):
    clean = mask(text)
    assert STARS in clean and "VALUE" not in clean and LETTERS not in clean
    assert mask(clean) == clean


def test_secret_after_its_option_in_a_list():
    assert redact(["--token", "geheim", "--tau", "1"]) == ["--token", STARS, "--tau", "1"]
    assert redact([("token", "geheim"), {"a": ["password", "geheim"]}]) == [
        ("token", STARS),
        {"a": ["password", STARS]},
    ]
    for plain in (
        ["key", "value"],
        ["query", "key", "value"],
        ("key", 3),
        ["--token", "--tau"],
        ["pad_token", "x"],
        ["hub_token", "a.token"],
    ):
        assert redact(plain) == plain


def test_no_option_of_a_method_is_taken_for_a_secret():
    names = {action.dest for method in METHODS for action in make_parser(method)._actions}
    assert {name for name in names if is_secret_name(name)} == {"hub_token"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(SECRET_NAMES), st.sampled_from(sorted(SHAPES)), st.lists(st.text(max_size=5), max_size=3))
def test_wherever_it_lies(around, name, shape, path):
    """At any depth, beside anything."""
    value = {name: "geheim77", "shape": SHAPES[shape], "around": around}
    for step in path:
        value = [around, {f"_{step}": value}]
    text = json.dumps(redact(value))
    assert "geheim77" not in text and json.dumps(HIDDEN.get(shape, SHAPES[shape]))[1:-1] not in text


def test_what_would_be_copied_is_refused_by_name():
    plan = {
        "train": {"tau": 0.3, "hub_token": "x", "pad_token": "<pad>", "model_init_kwargs": {"token": "y"}},
        "methods": {"capo": {"method": "capo", "run_name": f"of {SHAPES['hub']}"}, "grpo": None},
        "evaluate": {"chat_template_kwargs": '{"api_key": "z"}'},
    }
    found = list(secret_problems("plan.yaml", plan))
    names = ["train.hub_token", "train.model_init_kwargs.token", "methods.capo.run_name"]
    names.append("evaluate.chat_template_kwargs")
    assert [message.partition(" is or contains")[0] for message in found] == [f"plan.yaml: {name}" for name in names]
    assert not any(secret in message for message in found for secret in (SHAPES["hub"], "'x'", 'z"'))


@given(st.text())
def test_masking_twice_changes_nothing(text):
    assert mask(mask(text)) == mask(text)


@pytest.mark.parametrize(
    "piece",
    ("a.a", "a+", "token", "hf_", "a=b=", "://a", '"a": ', "-----BEGIN PRIVATE KEY-----", "eyJaaaaaa.", "token:")
    + ("token: {", "auth=[", "token=[\n", 'token: "', "token='\\'", '\\"token\\":', "-u a:", "password ", "machine a ")
    + ("key = ", "?sig=", "token%3D", "-----BEGIN ", "default login a password ", 'password:"\\'),
)
def test_long_text_takes_no_time(piece):
    """Each pattern is bounded, so text of 200,000 characters is no trap: four times the text, four times the work."""

    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        return min(timeit.repeat(lambda: mask(text), number=1, repeat=2))

    assert seconds(200_000) < max(1.0, 10 * seconds(50_000))


def test_nothing_that_a_run_writes_holds_a_secret(tiny_model, tmp_path):
    """A real run with checkpoints, resumed once; what is legitimate stays in its recipe."""
    secrets = {
        "hub_token": f"hf_{LETTERS}",
        "token": "geheim-one",
        "openai": SHAPES["openai"],
        "url": "geheim-three",
    }
    options = dict(ref_ppl_mask=False, max_steps=2, save_strategy="steps", save_steps=1, max_prompt_tokens=64)
    options |= {"hub_token": secrets["hub_token"], "run_name": f"https://me:{secrets['url']}@example.com/x"}
    recipe = recipe_options(tiny_model, tmp_path / "run", **options)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    kwargs = json.dumps({"token": secrets["token"], "revision": "main"})
    arguments = ["--config", str(tmp_path / "mine.yaml"), f"--model_init_kwargs={kwargs}"]
    arguments += ["--system_prompt", f"a {secrets['openai']}"]
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["train", *arguments, "--resume_from_checkpoint", "true", "--max_steps", "3"]) == 0

    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "reproduction.json", "README.md", "training_args.bin"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        found = [name for name, secret in secrets.items() if secret.encode() in content]
        assert not found, (path, found)
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["max_prompt_tokens"] == 64 and json.loads(kept["model_init_kwargs"]) == {"revision": "main"}
    record = json.loads((tmp_path / "run" / "reproduction.json").read_text())
    assert sorted(record["left_out"]) == ["hub_token", "model_init_kwargs.token"]
    assert "hub_token" in (tmp_path / "run" / "recipe.yaml").read_text().partition("method:")[0]  # names, in a comment


@pytest.mark.parametrize("own", [True, False])
def test_pickled_arguments(tiny_model, tmp_path, own):
    """Also those of TRL's own configuration, which GRPO through the seam takes; the trainer keeps its token."""
    from trl import GRPOConfig

    from trl_capo import GroupAdvantageConfig, GroupAdvantageTrainer

    kwargs = config_kwargs(tmp_path / "run", hub_token="geheim-one", model_init_kwargs={"token": "geheim-two"})
    args = (GroupAdvantageConfig if own else GRPOConfig)(**kwargs)
    trainer = GroupAdvantageTrainer(tiny_model, parity_reward, args, prompt_dataset())
    trainer.save_model()
    content = (tmp_path / "run" / "training_args.bin").read_bytes()
    assert b"geheim" not in content and (trainer.args.hub_token, trainer.args is args) == ("geheim-one", True)
    loaded = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert type(loaded) is type(args) and loaded.hub_token is None and loaded.learning_rate == args.learning_rate
    assert loaded.lr_scheduler_type is args.lr_scheduler_type  # an enumeration's member, not its text
    if own:
        assert "geheim" not in args.to_json_string()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))])
def test_a_copy_of_a_configuration_is_whole(tmp_path, copied):
    """Only what is written beside a model is without secrets: a copy trains, and may have to push."""
    from trl_capo import CAPOConfig

    args = CAPOConfig(**config_kwargs(tmp_path, hub_token="geheim", model_init_kwargs={"token": "geheim"}))
    other = copied(args)
    assert other == args and (other.hub_token, other.model_init_kwargs) == ("geheim", {"token": "geheim"})
    assert [type(value) for value in vars(other).values()] == [type(value) for value in vars(args).values()]


def test_text_that_is_clean_keeps_its_type():
    from transformers.trainer_utils import SaveStrategy

    assert redact({"save_strategy": SaveStrategy.STEPS})["save_strategy"] is SaveStrategy.STEPS


def test_settings_of_a_folder(tmp_path):
    from trl_capo.files import check_settings, remember_settings, write_json

    settings = {"train": {"hub_token": "geheim", "tau": 1}, "model": f"https://me:geheim@x.y/{LETTERS}"}
    remember_settings(tmp_path / "run", settings, "a run")
    check_settings(tmp_path / "run", settings, "a run")  # the same settings are still the same
    assert "geheim" not in (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(ValueError, match="with train="):
        check_settings(tmp_path / "run", {**settings, "train": {"hub_token": "geheim", "tau": 2}}, "a run")
    write_json(tmp_path / "any.json", {"reason": f"no access with hf_{LETTERS}", "nan": float("nan")})
    assert json.loads((tmp_path / "any.json").read_text()) == {"reason": "no access with ***", "nan": None}
