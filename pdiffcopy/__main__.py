"""Where the program begins, also as ``python -m pdiffcopy``."""

import signal


def main() -> None:
    """Run the command line interface. Signals wait until it can say what they have ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    from pdiffcopy.cli import main

    main()


if __name__ == "__main__":
    main()
