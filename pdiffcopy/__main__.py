"""Where the program begins, also as ``python -m pdiffcopy``."""

import gc
import signal


def main() -> None:
    """Run the command line interface. Signals wait until it can say what they have ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    gc.disable()  # modules aren't garbage, and to look for some among them takes time, now and later
    from pdiffcopy.cli import main

    gc.freeze()
    gc.enable()
    main()


if __name__ == "__main__":
    main()
