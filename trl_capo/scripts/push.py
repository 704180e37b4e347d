"""`trl-capo push`: upload a trained model to the Hub, or go on with an upload that failed.

    trl-capo push runs/capo --repo_id me/qwen-capo --private

All files go up in one commit, so that the Hub never shows half a model; what is there already is not sent again. The
card gets how the model was trained, and the calibration report if the folder has one. The folder stays as it is.
"""

import argparse
import sys

from trl_capo.cli import main as cli_main
from trl_capo.publish.push import PushError, push_folder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo push", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder of the model: the output_dir of a run, or one of its checkpoints")
    parser.add_argument("--repo_id", required=True, help="name on the Hub: NAME, or OWNER/NAME")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="upload only into a private repository, created if there is none (default: hub_private_repo of the run)",
    )
    parser.add_argument("--dataset", help="dataset on the Hub that the card names (default: that of the run)")
    parser.add_argument("--revision", help="branch to push to, which must exist (default: main)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Upload; 1 if the Hub did not take it."""
    args = make_parser().parse_args(argv)
    try:
        push_folder(
            args.folder,
            args.repo_id,
            private=args.private,
            dataset=args.dataset,
            revision=args.revision,
        )
    except PushError as error:
        print(f"trl-capo push: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli_main(["push", *sys.argv[1:]]))
