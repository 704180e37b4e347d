"""Prompts that the chat template or the vocabulary cannot take are refused before training."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from tests.helpers import CHAT_TEMPLATE, config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer
from trl_capo.errors import UserError
from trl_capo.models.prompts import tokenize
from trl_capo.preflight.prompts import check_lengths_fit, check_prompts_fit


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
DROPS = CHAT_TEMPLATE.replace("{{", "{% if message['role'] != 'system' %}{{").replace("}}", "}}{% endif %}")
THINKS = "{% if not enable_thinking %}{{ raise_exception('think') }}{% endif %}" + CHAT_TEMPLATE


def rows(*roles: str) -> Dataset:
    user = [{"role": "user", "content": "1+1="}]
    long = [{"role": role, "content": "12"} for role in roles]
    return Dataset.from_dict({"prompt": [user, long or user, user]})


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSES, "refuses a prompt with the roles system, user .no system role.. Put the system message's text"),
        (DROPS, "leaves the system message out of the prompt. Put its text into the user's message"),
        (None, "has no chat template. Use an instruct model, set tokenizer.chat_template, or give prompts as plain"),
    ],
)
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset['hard']"])
def test_templates_without_a_system_role(tokenizer, template, message, part):
    tokenizer.chat_template = template
    bad, good = rows("system", "user"), Dataset.from_dict({"prompt": ["1+1="]})
    train = (
        dict(train_dataset=bad) if part == "train_dataset" else dict(train_dataset=good, eval_dataset={"hard": bad})
    )
    with pytest.raises(UserError, match=message) as caught:
        check_prompts_fit(tokenizer, 17, None, **train)
    assert str(caught.value).startswith(part)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REFUSES, DROPS])
def test_prompts_that_fit_pass(tokenizer, template):
    tokenizer.chat_template = template
    check_prompts_fit(tokenizer, 17, None, train_dataset=rows("user", "assistant", "user"), eval_dataset=None)
    if template == CHAT_TEMPLATE:
        check_prompts_fit(tokenizer, 17, None, train_dataset=rows("system", "user"))
    tokenizer.chat_template = None
    check_prompts_fit(tokenizer, 17, None, train_dataset=Dataset.from_dict({"prompt": ["1+1="]}))


def test_options_reach_the_template(tokenizer):
    tokenizer.chat_template = THINKS
    check_prompts_fit(tokenizer, 17, {"enable_thinking": True}, train_dataset=rows())
    with pytest.raises(UserError, match="think"):
        check_prompts_fit(tokenizer, 17, {"enable_thinking": False}, train_dataset=rows())


def test_tokens_outside_the_vocabulary(tokenizer):
    with pytest.raises(UserError, match="the token '=' with id 15, but the model's vocabulary has 10"):
        check_prompts_fit(tokenizer, 10, None, train_dataset=rows())
    check_prompts_fit(tokenizer, 17, None, train_dataset=rows())
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(UserError, match="pad_token '<new>' has id"):
        check_prompts_fit(tokenizer, 17, None, train_dataset=rows())


@pytest.mark.parametrize("conversations", [False, True])
def test_prompts_beyond_the_context(tokenizer, conversations):
    """Position 1,500 of 1,501 rows is found, and a prompt that just fits is not refused."""

    def prompts(tokens):
        texts = ["1"] * 1500 + ["1" * tokens]
        return Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": text}] for text in texts] if conversations else texts}
        )

    around = 0 if not conversations else len(tokenize(tokenizer, [[{"role": "user", "content": "1"}]])[0]) - 1
    config, args = Qwen2Config(max_position_embeddings=64), SimpleNamespace(max_completion_length=24)
    args.chat_template_kwargs = None
    check_lengths_fit(tokenizer, config, args, train_dataset=prompts(40 - around), eval_dataset=None)
    with pytest.raises(UserError, match=r"eval_dataset\['hard'\]: row 1500 has a prompt of 41 tokens.*leaves 40"):
        check_lengths_fit(tokenizer, config, args, eval_dataset={"hard": prompts(41 - around)})
    check_lengths_fit(tokenizer, PreTrainedConfig(), args, train_dataset=prompts(500))


def test_a_trainer_refuses_prompts_beyond_the_context(tiny_model, tmp_path):
    args = CAPOConfig(**config_kwargs(tmp_path / "run", ref_ppl_mask=False))
    context = Qwen2Config.from_pretrained(tiny_model).max_position_embeddings
    long = Dataset.from_dict({"prompt": ["1+1="] * 7 + ["1" * context]})
    with pytest.raises(UserError, match=f"row 7 has a prompt of {context} tokens. With max_completion_length="):
        CAPOTrainer(tiny_model, parity_reward, args, long)


@pytest.mark.parametrize("as_instance", [False, True])
def test_a_trainer_refuses_them_before_it_loads_the_weights(tiny_model, tmp_path, tokenizer, as_instance):
    config = Qwen2Config.from_pretrained(tiny_model)
    config.vocab_size = 10
    args = CAPOConfig(**config_kwargs(tmp_path / "run", ref_ppl_mask=False))
    model = str(tmp_path / "model")
    config.save_pretrained(model)  # there are no weights
    tokenizer.save_pretrained(model)
    if as_instance:
        model = Qwen2ForCausalLM(config)
    with pytest.raises(UserError, match="vocabulary has 10"):
        CAPOTrainer(model, parity_reward, args, prompt_dataset(), processing_class=tokenizer if as_instance else None)


def test_a_model_that_is_loaded_is_checked_too(tiny_model, tmp_path, tokenizer):
    """Without a processing class TRL looks for the tokenizer where the model came from."""
    tokenizer.chat_template = REFUSES
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    args = CAPOConfig(**config_kwargs(tmp_path / "run", ref_ppl_mask=False))
    with pytest.raises(UserError, match="no system role"):
        CAPOTrainer(model, parity_reward, args, Dataset.from_dict({"prompt": [*rows("system", "user")["prompt"]] * 4}))
