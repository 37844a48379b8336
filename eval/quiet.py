"""Other libraries' progress bars and warnings, silenced; their errors are not."""

import logging
import os


def quiet_libraries() -> None:
    """To be called before the libraries load: that is when they read these switches."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
