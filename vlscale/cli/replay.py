"""`vlscale replay`: a step of a run again, to see what was in its batch."""

from pathlib import Path
from typing import Annotated

import typer


def replay(
    run: Annotated[Path, typer.Argument(help="Run folder, or that of one of its stages or variants.")],
    step: Annotated[int, typer.Option(help="The step to run again.")],
) -> None:
    """Run one step again, from the checkpoint before it: its loss, parts, gradient norm and samples.

    Start it as the run was, under torchrun for several ranks; a run with train.elastic=true takes any number of them.
    """
    from vlscale.train.replay import replay as again  # torch loads only when it is needed

    found = again(run, step)
    if not found.ranks.first:
        return
    print(f"step {found.step}")
    for name, value in found.values.items():
        print(f"{name} {value!r}")
    print(f"keys {found.keys_hash}")
    if found.recorded is not None:
        same = found.recorded["keys"] == found.keys_hash
        print(f"recorded loss {found.recorded['loss']} keys {found.recorded['keys']}{'' if same else ' (differs)'}")
    print("samples")
    print("\n".join(found.keys))
