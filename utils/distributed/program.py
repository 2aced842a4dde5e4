"""A program from its first line to its last, on one rank: which errors end it as a message."""

import logging
import os
import sys
import time
import warnings

from utils.distributed import peers, preemption, process_group
from utils.errors import UserError


def run(main) -> None:
    """Call a program's `main`; what a user can mend ends as one message, not as a traceback a rank.

    UserError, SystemExit("…") and files that cannot be written or read are such. Any other
    exception is a bug and keeps its traceback.
    """
    preemption.watch()
    try:
        main()
    except KeyboardInterrupt:
        peers.stop()
        process_group.say("interrupted; --resume auto goes on from the newest checkpoint")
        os._exit(130)
    except RuntimeError as error:
        peers.wait_for_news()  # a collective fails where a peer has died
        if not process_group.timed_out(error):
            raise
        _exit(
            f"error on rank {process_group.rank()}: another rank did not come to a collective "
            "within --timeout_minutes: it hangs, or its work takes longer than that; the run ends, "
            f"--resume auto goes on from the newest checkpoint ({error})"
        )
    except (UserError, OSError, SystemExit) as error:
        peers.stop()
        preemption.stop()
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            process_group.end_process(error.code or 0)
            raise
        if process_group.is_main():
            _exit(f"error: {error}")
        else:
            # Rank 0 mostly fails the same way and speaks for all: the launcher ends this rank
            # when rank 0 exits. A failure of this rank alone is told a little later.
            time.sleep(3.0)
            _exit(f"error on rank {process_group.rank()}: {error}")
    process_group.end_process()


def _exit(text: str) -> None:
    """At once: peers may wait in a collective for ever, and the launcher ends them."""
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def quiet_libraries() -> None:
    """Silence what is not about the run: info logs of libraries, and notices to developers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says of each product what it casts
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
