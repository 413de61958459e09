"""The benchmark suite: python -m benchmarks COMMAND ..., with --help for each command."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = (
    "stages",
    "tasks",
    "stores",
    "tune",
    "scale",
    "compare",
    "plot",
    "soak",
    "demos",
    "probes",
    "networks",
)
USAGE = f"usage: python -m benchmarks COMMAND ...\n\nCOMMAND is one of: {', '.join(COMMANDS)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 2 for a user's mistake, which is told in one line.

    Only the module of the command asked for is imported: `compare` needs no DALI.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n{USAGE}", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    name = given[0]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m benchmarks: no command {name!r}; there are {known}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"benchmarks.{name}")
    program = f"python -m benchmarks {name}"
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"{command.HELP}\n\n{command.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    parsed = parser.parse_intermixed_args(given[1:])
    try:
        _apply_common(parsed)
        return command.main(parsed)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def run_command(name: str) -> NoReturn:
    """For `python -m benchmarks.NAME ...`, which is `python -m benchmarks NAME ...`."""
    sys.exit(main([name, *sys.argv[1:]]))


def _apply_common(parsed: argparse.Namespace) -> None:
    """Makes --quick what `method.add_common` says it is; the commands see repeats and seconds."""
    if "repeats" not in parsed:
        return  # a command that does not measure by turns
    if parsed.quick:
        parsed.repeats, parsed.seconds = 1, min(parsed.seconds, 0.2)
    elif parsed.repeats < 3:
        raise ValueError(
            f"--repeats ({parsed.repeats}) must be at least 3: fewer show no spread "
            "(--quick takes 1, to see whether it runs)"
        )
    if parsed.seconds <= 0 or parsed.threads < 1:
        raise ValueError(
            f"--seconds ({parsed.seconds}) must be above 0 and --threads ({parsed.threads}) "
            "at least 1"
        )


if __name__ == "__main__":
    sys.exit(main())
