"""Prepares images for training: looks at them, packs them into tars, checks and unpacks these.

    python -m fastssl.data pack /data/imagenet/train /fast/train --shard-mb 512
    python -m fastssl.data verify /fast/train
    python fastssl/train.py recipes/rotation.yaml data.use=pipelines.readers.tar data.root=...

Each command is a module of its own, which says more: python -m fastssl.data COMMAND --help
"""

import argparse
import inspect
import sys
from collections.abc import Sequence

from fastssl import check, pack_command, store_verify, tar_index, unpack

# Nothing that imports torch may be imported here: every worker process imports this file again.

# A command is a module that offers `arguments(parser)` and `run(given) -> exit code`; its first
# line of documentation is the command's help. ValueError and OSError become one line here.
COMMANDS = {
    "check": check,
    "pack": pack_command,
    "verify": store_verify,
    "unpack": unpack,
    "index": tar_index,
}


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit code: 1: something is damaged; 2: the user can mend it."""
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.data",
        description=inspect.cleandoc(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        says = inspect.cleandoc(module.__doc__ or "")
        command = commands.add_parser(
            name,
            help=says.partition("\n")[0],
            description=says,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.arguments(command)
    if not arguments or arguments[0] not in COMMANDS:
        parser.parse_args(arguments)  # help, or what is wrong with it: ends here
        raise AssertionError
    # Not by the parser of all: it can't take data.key=value behind an option.
    given = commands.choices[arguments[0]].parse_intermixed_args(arguments[1:])
    try:
        return COMMANDS[arguments[0]].run(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
