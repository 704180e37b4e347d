"""The variables a model was trained with stay with its chat template."""

import jinja2
import pytest
from transformers import AutoTokenizer

from trl_capo.data.arithmetic import BASE_MODEL
from trl_capo.errors import UserError
from trl_capo.models.chat_templates import add_defaults, read_kwargs, with_defaults


VALUES = [False, True, None, 0, -2.5, "", 'a "b"\n\\ %} {{ c }} {% d %} ü 😀', [1, [None, "x"]], {"k": {"l": [True]}}]

RENDERER = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers


@pytest.mark.parametrize("template", ["\n x", "  {% if true %}\n  y{% endif %}", "{{ 1 }}", " {# c #} z"])
def test_the_rest_of_a_template_is_left_as_it_is(template):
    with_defaults = RENDERER.from_string(add_defaults(template, {"a": 1})).render()
    assert with_defaults == RENDERER.from_string(template).render()


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_value_arrives_as_it_is(value):
    """Rendered by Jinja itself, into a function that notes what it gets."""
    seen = []
    template = RENDERER.from_string(add_defaults("{% if note(a) %}{% endif %} text", {"a": value}))
    assert template.render(note=seen.append) == " text"
    assert seen == [value] and type(seen[0]) is type(value)
    template.render(note=seen.append, a="passed")
    assert seen[1] == "passed"


def test_done_once_and_the_newest_decides():
    once = add_defaults("{{ a }}", {"a": 1, "b": 2})
    assert add_defaults(once, {"a": 1, "b": 2}) == once
    assert RENDERER.from_string(add_defaults(once, {"a": 3})).render() == "3"


def test_a_tokenizer_renders_and_saves_them_and_the_given_one_is_left(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.chat_template = before = (
        "{{ messages[0]['content'] }}{% if think is defined and not think %};{% endif %}"
    )
    asked = [{"role": "user", "content": "1+1="}]
    assert with_defaults(tokenizer, None) is tokenizer is with_defaults(tokenizer, {})
    with_defaults(tokenizer, {"think": False}).save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    wanted = tokenizer.apply_chat_template(asked, think=False)["input_ids"]
    assert saved.apply_chat_template(asked)["input_ids"] == wanted
    assert tokenizer.chat_template == before
    assert (
        tokenizer.apply_chat_template(asked)["input_ids"] == saved.apply_chat_template(asked, think=True)["input_ids"]
    )
    assert tokenizer.apply_chat_template(asked)["input_ids"] != wanted


@pytest.mark.parametrize("text", ["nonsense", "[1]", "3", '{"a b": 1}', '{"a": NaN}'])
def test_what_is_no_object_of_variables_is_refused(text):
    with pytest.raises(UserError, match="chat_template_kwargs"):
        read_kwargs(text)
    assert read_kwargs(None) == {} and read_kwargs('{"a": false}') == {"a": False}


def test_a_trained_model_is_asked_as_it_was_trained(tmp_path):
    """What TRL renders with the arguments of the run is what the saved tokenizer renders without them."""
    from datasets import Dataset

    from trl_capo import CAPOConfig, CAPOTrainer
    from trl_capo.models.prompts import tokenize

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if think is defined and not think %};{% endif %}"
    prompt = [{"role": "user", "content": "1+1="}]
    args = CAPOConfig(
        str(tmp_path), max_completion_length=2, num_generations=2, per_device_train_batch_size=2, ref_ppl_mask=False,
        use_cpu=True, bf16=False, report_to="none", chat_template_kwargs={"think": False}, push_to_hub=False,
    )  # fmt: skip
    reward = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    data = Dataset.from_dict({"prompt": [prompt] * 4})
    trainer = CAPOTrainer(str(BASE_MODEL), reward, args, data, processing_class=tokenizer)
    asked = trainer._tokenize_prompts([prompt])[0]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenize(saved, [prompt]) == asked != tokenize(tokenizer, [prompt])
