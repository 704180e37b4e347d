"""Silence the libraries' own messages and progress bars."""

import logging
import warnings

import datasets
import transformers


def be_quiet() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
