"""Scores of a model: its whole validation split, lm-eval's tasks, and paired tests of two models."""

import os

# The bars and notes of other libraries are silenced; the progress is ours. They read this when they are imported.
os.environ |= {
    "TQDM_DELAY": "1e9",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
