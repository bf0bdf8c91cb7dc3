"""The `vlscale` command: one small file a subcommand, put together here."""

import os
import sys
import time

import typer

from vlscale.cli import bench, data, demo, doctor, embed, evaluate, export, import_model, replay, report, search, train
from vlscale.logging import setup_logging, without_secrets

OTHERS_WAIT = 10.0  # seconds

app = typer.Typer(
    name="vlscale",
    help="Train, evaluate and share vision-language retrieval models that keep the relations inside each modality.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("train", context_settings={"ignore_unknown_options": True})(train.train)
app.command("eval")(evaluate.evaluate)
app.command("embed")(embed.embed)
app.command("search")(search.search)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("replay")(replay.replay)
app.command("doctor")(doctor.doctor)
app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(bench.bench)
app.add_typer(data.app, name="data")
app.add_typer(import_model.app, name="import")


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Wrong input (ValueError) is one line on stderr and exit code 2; anything else is a fault of ours
    and keeps its traceback. VLSCALE_TRACEBACK=1 shows the traceback of wrong input too."""
    setup_logging()
    try:
        app(arguments)
    except ValueError as error:
        if os.environ.get("VLSCALE_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            # All ranks find the same fault in a config. The first one says it, and its launcher then ends the others;
            # one that ended at once would have the launcher end the first before it spoke.
            time.sleep(OTHERS_WAIT)
        print(f"error: {f'rank {rank}: ' if rank else ''}{without_secrets(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
