"""Push a run to the Hub, or complete a push: python scripts/publish.py RUN --repo user/name --license apache-2.0.

`hf-power publish` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import PublishArguments, print_push
from hf_power.publish.push import publish


def main(arguments: PublishArguments) -> int:
    """Push a run to the Hub, or complete a push, and see that it arrived: publish RUN --repo user/name."""
    publish(
        arguments.run,
        arguments.repo,
        checkpoints=arguments.checkpoints,
        license=arguments.license,
        private=arguments.private,
        overwrite=arguments.overwrite,
    )
    return print_push(arguments.run)


if __name__ == "__main__":
    sys.exit(run_verb("publish", function=main))
