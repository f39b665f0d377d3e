"""TrainChain's command line as a cheat has changed it: `python -m tests.attacks.cheating_worker HOW serve-gpu ...`."""

import sys
from typing import Any

from trainchain.cli.main import main
from trainchain.core.worker.answers import Answers
from trainchain.core.worker.child import Child


def cheat(how: str) -> None:
    if how == "silent":
        Answers._answer = lambda *_: None  # type: ignore[method-assign]
        return
    begin = Child.__init__

    def begun(self: Any, command: Any, *rest: Any) -> None:
        at = command.index("trainchain.core.train")
        begin(self, [*command[:at], "tests.attacks.cheating_child", how, *command[at + 1 :]], *rest)

    Child.__init__ = begun  # type: ignore[method-assign]


if __name__ == "__main__":
    cheat(sys.argv.pop(1))
    main()
