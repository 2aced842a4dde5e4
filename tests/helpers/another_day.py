"""Runs a step's main as step_worker does, with every rank's clock so many days ahead, and a day
more for each rank.

arguments: days, program, then the program's own.
"""

import datetime
import importlib.util
import os
import sys
from types import SimpleNamespace

from transformers.utils import chat_template_utils

from utils.checkpoints import resuming


def main() -> None:
    days, program, *argv = sys.argv[1:]
    ahead = datetime.timedelta(days=int(days) + int(os.environ.get("RANK", 0)))
    clock = SimpleNamespace(now=lambda: datetime.datetime.now() + ahead)
    today = SimpleNamespace(date=SimpleNamespace(today=lambda: datetime.date.today() + ahead))
    clocks = chat_template_utils.datetime, resuming.datetime
    spec = importlib.util.spec_from_file_location("on_another_day", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [program, *argv]
    chat_template_utils.datetime, resuming.datetime = clock, today
    try:
        module.main()
    finally:
        chat_template_utils.datetime, resuming.datetime = clocks
