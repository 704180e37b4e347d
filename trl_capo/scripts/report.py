"""`trl-capo report`: one self-contained page that compares the samples of any number of runs.

    trl-capo report runs/evaluation/base runs/evaluation/capo --output report.html

    trl-capo report runs/evaluation/capo --model_card runs/capo

Each run is a `samples.parquet` file or its folder. The page has training curves for runs with a `--trainer_states`.
"""

import argparse
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError
from trl_capo.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo report", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", nargs="+", help="samples.parquet files or their folders; the first is the baseline")
    parser.add_argument("--names", nargs="+", help="names of the runs (default: their folders)")
    parser.add_argument(
        "--trainer_states",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="trainer_state.json of a run, for its training curves",
    )
    parser.add_argument("--output", default="report.html", help="file for the page (default: %(default)s)")
    parser.add_argument("--model_card", metavar="FOLDER", help="add tables and figures to the card of this model")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the samples, check them, and write the page."""
    args = make_parser().parse_args(argv)
    if missing := [path for path in args.samples if not Path(path).exists()]:
        raise UserError(
            f"{missing[0]} does not exist. Give a samples.parquet file or its folder, as written by `trl-capo "
            "evaluate MODEL --benchmark ...`."
        )
    if args.model_card is not None and not Path(args.model_card).is_dir():
        raise UserError(f"--model_card must be the folder of a model: {args.model_card} is not a folder.")
    import numpy as np

    from trl_capo.evaluation.samples import read_samples
    from trl_capo.publish.card import add_to_model_card
    from trl_capo.report.page import read_history, run_names, write_report

    require("report")
    names = args.names or run_names(args.samples)
    if len(names) != len(args.samples) or len(set(names)) != len(names):
        raise UserError(f"--names must give {len(args.samples)} different names, one per run, got {', '.join(names)}.")
    histories = {}
    for pair in args.trainer_states:
        name, _, file = pair.partition("=")
        if name not in names or not file:
            raise UserError(
                f"--trainer_states must be NAME=FILE, where NAME is one of {', '.join(names)}, got {pair!r}."
            )
        histories[name] = read_history(Path(file))
    runs = {name: read_samples(path) for name, path in zip(names, args.samples, strict=True)}
    for name, sets in runs.items():
        for samples in sets:
            if np.isnan(samples.correct).all():
                print(
                    f"Note: no answer of {name} to {samples.benchmark} is graded, because no gold answer can be "
                    "parsed. Every number that needs grades is undefined.",
                    file=sys.stderr,
                )
    path = write_report(runs, args.output, histories=histories)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), with figures and {path.with_suffix('.md').name} next to it")
    if args.model_card is not None:
        print(f"Added to {add_to_model_card(path.with_suffix('.md'), args.model_card)}")


if __name__ == "__main__":
    sys.exit(cli_main(["report", *sys.argv[1:]]))
