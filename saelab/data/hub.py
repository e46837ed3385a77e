"""Keeps the libraries that download models and data sets quiet; failures are raised as errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_loggers() -> Iterator[None]:
    """Silences the hub's reports of retries and the loaders' remarks within the block."""
    import huggingface_hub.utils.logging
    import transformers.utils.logging as transformers_logging

    transformers_logging.get_logger()  # both set their own levels when they are first used
    huggingface_hub.utils.logging.get_logger()
    loggers = [logging.getLogger(n) for n in ("transformers", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hides the progress bars of transformers within the block."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
