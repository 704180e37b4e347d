"""Load the prompts of a training run by name, from the Hub, a folder or a file; clean, split and count them.

`trl-capo train` reads prompts with the options of `DataArguments`. `trl-capo data check` shows the resulting rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from trl_capo.data import language
from trl_capo.data.benchmarks import load_benchmark
from trl_capo.data.catalogue import CATALOGUE, load_catalogued, location
from trl_capo.data.conversations import drop_unparsable_gold, to_conversations
from trl_capo.data.files import read_dataset
from trl_capo.data.prepare import deduplicate, train_and_validation, within_budget, without_questions_of
from trl_capo.errors import UserError
from trl_capo.ranks import agree


VALIDATION = "validation"
ROW = "__row__"  # a temporary column while rows are dropped


@dataclass
class DataArguments:
    """Preparation of a dataset before training. All of it is off by default.

    Parameters:
        dataset_prompt_column (`str`, *optional*):
            Column of the questions, text or conversations. By default `prompt`; the catalogue knows its own.
        dataset_solution_column (`str`, *optional*):
            Column of the gold answers. By default `solution`; the catalogue knows its own.
        system_prompt (`str`, *optional*):
            System message put before questions that are plain text.
        prompt_template (`str`, *optional*):
            Instead of a system prompt, a key of `trl_capo.data.conversations.PROMPT_TEMPLATES`.
        drop_unparsable_gold (`bool`, *optional*, defaults to `False`):
            Drop rows whose gold answer math-verify cannot parse instead of refusing them.
        deduplicate (`bool`, *optional*, defaults to `False`):
            Keep only the first copy of each conversation.
        exclude_benchmarks (`list[str]`, *optional*):
            Drop the questions of these benchmarks.
        max_prompt_tokens (`int`, *optional*):
            Drop prompts with more tokens than this.
        num_train_prompts (`int`, *optional*):
            Number of training prompts to sample.
        num_validation_prompts (`int`, *optional*, defaults to `0`):
            Number of prompts to set aside as a split `validation`.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of the two samples.
    """

    dataset_prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the questions, text or conversations (default: prompt)."}
    )
    dataset_solution_column: str | None = field(
        default=None, metadata={"help": "Column of the gold answers (default: solution)."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before questions that are plain text."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Template, instead of a system prompt: qwen25-math-cot, qwen-boxed or step-by-step."},
    )
    drop_unparsable_gold: bool = field(
        default=False,
        metadata={"help": "Drop rows whose gold answer math-verify cannot parse instead of refusing them."},
    )
    deduplicate: bool = field(default=False, metadata={"help": "Keep only the first copy of each conversation."})
    exclude_benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Drop the questions of these benchmarks."}
    )
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Drop prompts with more tokens than this."})
    num_train_prompts: int | None = field(default=None, metadata={"help": "Number of training prompts to sample."})
    num_validation_prompts: int = field(
        default=0, metadata={"help": "Number of prompts to set aside as a split `validation`."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of these two samples."})

    def __post_init__(self):
        if self.num_validation_prompts < 0 or (self.num_train_prompts is not None and self.num_train_prompts < 1):
            raise UserError(
                f"num_train_prompts must be at least 1 and num_validation_prompts at least 0, got "
                f"{self.num_train_prompts} and {self.num_validation_prompts}."
            )


def load_splits(name: str | None, config: str | None, args: DataArguments, streaming: bool = False, mixture=None):
    """The splits of a dataset by name, as conversations.

    Args:
        name: `arithmetic`, a key of `language.TASKS` or of `CATALOGUE`, a file (.parquet, .jsonl, .json, .csv), a
            folder, or a dataset id.
        config: Its configuration.
        args: Columns and prompts.
        streaming: Stream the rows instead of loading all of them.
        mixture: TRL's `DatasetMixtureConfig`. If it names datasets, these are read instead.

    Returns:
        Mapping from split to rows.

    Raises:
        UserError: No dataset is named, or a column is missing.
    """
    from trl import get_dataset

    if name == "arithmetic":
        from trl_capo.data.arithmetic import SPLITS, arithmetic_dataset

        return {split: arithmetic_dataset(split) for split in SPLITS}
    if name in language.TASKS:
        return {split: language.language_dataset(name, split) for split in language.SPLITS}
    prompts: dict[str, Any] = dict(system_prompt=args.system_prompt, prompt_template=args.prompt_template)
    mixed = mixture is not None and mixture.datasets
    if name in CATALOGUE and not mixed:
        given = [
            option
            for option, value in {
                "dataset_prompt_column": args.dataset_prompt_column,
                "dataset_solution_column": args.dataset_solution_column,
                "dataset_config": config,
                "dataset_streaming": streaming,
            }.items()
            if value
        ]
        if given:
            raise UserError(
                f"{given[0]} has no effect on {name!r}, whose columns the catalogue knows. Leave it out, or name the "
                f"dataset by its path, {CATALOGUE[name].path}."
            )
        return {CATALOGUE[name].split: load_catalogued(name, **prompts)}
    if mixed:
        rows = get_dataset(mixture)
    elif name is None:
        raise UserError(
            f"dataset_name is missing: set it to a dataset id, a folder, a file, or one of "
            f"{', '.join(['arithmetic', *language.TASKS, *CATALOGUE])}."
        )
    else:
        where = {} if Path(name).is_file() else {**location(name), "name": config}
        rows = read_dataset(name, **where, streaming=streaming)
    columns = args.dataset_prompt_column or "prompt", args.dataset_solution_column or "solution"
    return to_conversations(rows, *columns, **prompts)


def prepare(
    rows: Dataset, args: DataArguments, tokenizer=None, part: str = "train", say: Callable = print
) -> dict[str, list[int] | IterableDataset]:
    """Choose the rows for training and, if requested, validation. Reports which rows were dropped, and why.

    Args:
        rows: Conversations with gold answers, from `load_splits`.
        args: The preparation options.
        tokenizer: Counts the tokens of prompts; only for `max_prompt_tokens`.
        part: "train", or another name for evaluation rows. From these, only prompts that cannot be asked or graded
            are removed.
        say: Receives one line.

    Returns:
        Indices by "train" and, with `num_validation_prompts`, "validation". For a stream, the rows themselves.

    Raises:
        UserError: Too few rows are left, or the dataset is a stream, whose rows cannot be compared.
    """
    cleaning = (
        "deduplicate",
        "exclude_benchmarks",
        "max_prompt_tokens",
        "num_train_prompts",
        "num_validation_prompts",
    )
    if isinstance(rows, IterableDataset):
        if named := [name for name in cleaning if getattr(args, name)]:
            raise UserError(f"{named[0]} needs all rows of the dataset, not a stream: set dataset_streaming=False.")
        return {"train": drop_unparsable_gold(rows) if args.drop_unparsable_gold else rows}
    story, whole = [f"{len(rows):,} prompts"], len(rows)
    rows = rows.add_column(ROW, range(whole))

    def keep(fewer: Dataset, why: str) -> Dataset:
        if len(fewer) < len(rows):
            story.append(f"{len(rows) - len(fewer):,} {why}")
        return fewer

    if args.drop_unparsable_gold:
        rows = keep(drop_unparsable_gold(rows), "without a readable gold answer")
    if args.max_prompt_tokens is not None:
        rows = keep(within_budget(rows, tokenizer, args.max_prompt_tokens), f"over {args.max_prompt_tokens} tokens")
    if part == "train" and args.deduplicate:
        rows = keep(deduplicate(rows), "repeated")
    if part == "train" and args.exclude_benchmarks:
        prompts: dict[str, Any] = dict(system_prompt=args.system_prompt, prompt_template=args.prompt_template)
        benchmarks = [load_benchmark(name, **prompts) for name in args.exclude_benchmarks]
        rows = keep(without_questions_of(rows, benchmarks), "in a benchmark")
    splits = {"train": rows}
    if part == "train" and (args.num_train_prompts is not None or args.num_validation_prompts):
        train, validation = train_and_validation(
            rows, args.num_train_prompts, args.num_validation_prompts, args.split_seed
        )
        splits = {"train": train} | ({VALIDATION: validation} if args.num_validation_prompts else {})
    if sum(map(len, splits.values())) < whole:
        dropped = f", less {', '.join(story[1:])}" if len(story) > 1 else ""
        use = {"train": "train on" if part == "train" else "evaluate on", VALIDATION: "validate on"}
        used = " and ".join(f"{len(chosen):,} to {use[split]}" for split, chosen in splits.items())
        say(f"Data: {story[0]}{dropped}; {used}.")
    return {split: list(chosen[ROW]) for split, chosen in splits.items()}


def load_data(script_args, data_args, mixture, training_args, model_args) -> tuple:
    """Rows to train on, and to evaluate on if the recipe does.

    The first process prepares the rows and tells the others which ones are left, because independent results could
    differ: math-verify gives up on a gold answer after a few seconds.
    """
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from trl_capo.models.chat_templates import with_defaults
    from trl_capo.models.source import model_path

    evaluates, test_split = training_args.eval_strategy != "no", script_args.dataset_test_split
    if data_args.num_validation_prompts and not (evaluates and test_split == VALIDATION):
        raise UserError(
            f"num_validation_prompts={data_args.num_validation_prompts} sets prompts aside that nothing uses. "
            f"Set eval_strategy and dataset_test_split: {VALIDATION}, or num_validation_prompts: 0."
        )
    tokenizer = None
    if data_args.max_prompt_tokens is not None:
        model = model_path(model_args.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
        tokenizer = with_defaults(tokenizer, training_args.chat_template_kwargs)
    with PartialState().main_process_first():
        splits = load_splits(
            script_args.dataset_name, script_args.dataset_config, data_args, script_args.dataset_streaming, mixture
        )
    rows = {"train": _split(splits, script_args.dataset_train_split, "dataset_train_split")}
    if evaluates and not data_args.num_validation_prompts:
        rows["eval"] = _split(splits, test_split, "dataset_test_split")
    if any(isinstance(part_rows, IterableDataset) for part_rows in rows.values()):
        prepared = {
            part: prepare(part_rows, data_args, tokenizer, part, print)["train"] for part, part_rows in rows.items()
        }
        return prepared["train"], prepared.get("eval")
    kept = agree(
        lambda: {part: prepare(part_rows, data_args, tokenizer, part, print) for part, part_rows in rows.items()}
    )
    train = rows["train"].select(kept["train"]["train"])
    if not evaluates:
        return train, None
    if VALIDATION in kept["train"]:
        return train, rows["train"].select(kept["train"][VALIDATION])
    return train, rows["eval"].select(kept["eval"]["train"])


def _split(dataset, split: str, option: str):
    if split not in dataset:
        raise UserError(f"{option}={split!r} is not a split of the dataset. Use one of {', '.join(dataset)}.")
    return dataset[split]
