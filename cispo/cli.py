"""The command line. Only names and help live here: `cispo --help` must answer before torch could be imported."""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, ParamSpec

import typer
from typer.core import TyperCommand

from cispo.errors import RunError, UserError

P = ParamSpec("P")

# Errors that no line of ours is to blame for: the disk, its quota, a limit on file sizes, too many open files.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)

app = typer.Typer(
    name="cispo",
    help="RL post-training for lightning-attention and mixture-of-experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_RECIPE = "A YAML recipe, or the name of a shipped one (quickstart)."
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help=_RECIPE, show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.", show_default=False)
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="DIR", help="A checkpoint folder; the recipe's policy when left out.")
]


def _sentences(*, answers: bool) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Bad input is one sentence and exit code 2, a run that broke is one and code 1, an interrupt is code 130.

    So is, with code 1, the loss of a command's output where it `answers` a question. A run goes on without a reader.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            from cispo.output.streams import lost_output
            from cispo.runtime.interrupts import EXIT_CODE, leave_at_once

            try:
                command(*args, **kwargs)
                if answers and (reason := lost_output()) is not None:
                    raise RunError(f"the output cannot be written: {reason}")
            except UserError as error:
                print(f"cispo: {error}", file=sys.stderr)
                sys.exit(2)
            except RunError as error:
                print(f"cispo: {error}", file=sys.stderr)
                sys.exit(1)
            except OSError as error:
                # A full disk leaves Python's tempfile without a folder.
                if error.errno not in _OF_THE_MACHINE and "temporary directory" not in str(error):
                    raise
                print(f"cispo: {error}", file=sys.stderr)
                sys.exit(1)
            except KeyboardInterrupt:
                leave_at_once()
                print("cispo: interrupted", file=sys.stderr)
                sys.exit(EXIT_CODE)

        return run

    return decorate


class _Resuming(TyperCommand):
    """A command with `--resume` and `--resume auto`. An option with an optional value would take any argument."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        rest = iter(args)
        given: list[str] = []
        for argument in rest:
            if argument == "--":
                given += [argument, *rest]
            elif argument == "auto" and given[-1:] == ["--resume=last"]:
                given[-1] = "--resume=auto"
            else:
                given.append("--resume=last" if argument == "--resume" else argument)
        return super().parse_args(ctx, given)


@app.command(cls=_Resuming)
@_sentences(answers=False)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        Literal["no", "last", "auto"],
        typer.Option(
            "--resume",
            metavar="[auto]",
            show_default=False,
            help="Go on with the last run of that name, from its newest checkpoint. auto: start it if there is none.",
        ),
    ] = "no",
) -> None:
    """Run a recipe: supervised warm-up if it has one, then reinforcement learning."""
    from cispo.commands.train import train

    train(recipe, overrides or [], resume="auto" if resume == "auto" else resume == "last")


@app.command()
@_sentences(answers=False)
def compare(
    items: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipes, and key=value changes to all of them.", show_default=False),
    ],
    algorithms: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Names, presets or module:NAME; with settings: 'grpo(kl_coef=0)'."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, from the recipe's seed on.")] = 5,
    metric: Annotated[str, typer.Option(help="Metric that arms are compared by; higher is better.")] = "eval/accuracy",
    updates_per_batch: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="Optimizer steps a batch; each K is a comparison of its own.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side, on shared GPUs too; by default as many as have their own."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Folder in output_dir; the recipe's name and -compare.")] = None,
    plot_only: Annotated[
        bool, typer.Option("--plot-only", help="Only rewrite the report of the runs that ended.")
    ] = False,
    fit: Annotated[bool, typer.Option("--fit", help="Fit ScaleRL's sigmoid to each arm.")] = False,
    equal: Annotated[
        Path | None, typer.Option("--assert-equal", metavar="FILE", help="Exit 1 unless results.json equals FILE.")
    ] = None,
) -> None:
    """Run algorithms side by side on one task, several seeds each, and report their differences with intervals."""
    from cispo.compare.command import compare

    compare(
        items,
        algorithms=algorithms,
        seeds=seeds,
        metric=metric,
        updates=updates_per_batch,
        parallel=parallel,
        name=name,
        plot_only=plot_only,
        fit=fit,
        equal=equal,
    )


@app.command()
@_sentences(answers=False)
def sft(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run only the supervised warm-up of a recipe and save the policy."""
    from cispo.commands.train import sft

    sft(recipe, overrides or [])


@app.command()
@_sentences(answers=True)
def evaluate(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN", help="A recipe, or a run folder: all of its checkpoints.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Measure a policy, or every checkpoint of a run, on the held-out prompts."""
    from cispo.commands.evaluate import evaluate_checkpoint

    evaluate_checkpoint(recipe, overrides or [], checkpoint)


@app.command()
@_sentences(answers=True)
def generate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The user's message.")] = "",
    checkpoint: Checkpoint = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many completions.")] = 4,
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A dataset column for the rewards (answer=42).")
    ] = None,
) -> None:
    """Sample completions of one prompt, with log-probabilities and rewards."""
    from cispo.commands.evaluate import generate

    generate(recipe, overrides or [], prompt=prompt, checkpoint=checkpoint, number=n, columns=column or [])


@app.command()
@_sentences(answers=True)
def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the resolved recipe, the algorithm in words, and the process and memory plan."""
    from cispo.commands.show import show

    show(recipe, overrides or [])


@app.command()
@_sentences(answers=True)
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may go on.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; view_RUN.html when left out.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Attempts on the page at most.")] = 10_000,
) -> None:
    """Write a run's samples as one web page: tokens by weight, ratio, entropy; turns; a prompt over training."""
    from cispo.commands.view.command import view

    view(run, out, limit=samples)


@app.command()
@_sentences(answers=True)
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="A new folder.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write an adapter (policy.lora) and its policy as one model.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face model folder, an adapter as peft's."""
    from cispo.commands.export import export

    export(checkpoint, to, dtype, merge=merge)


@app.command()
@_sentences(answers=True)
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help=_RECIPE, show_default=False)] = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Rank the causes of the difference, even where it is within its limit.")
    ] = False,
) -> None:
    """Check versions, devices, the lightning op, and sampler/learner parity of a recipe; rank causes of a mismatch."""
    from cispo.commands.doctor import doctor

    doctor(recipe, overrides or [], checkpoint, explain=explain)


def main() -> None:
    """Entry point of the `cispo` command."""
    from cispo.output.streams import spare_writers
    from cispo.runtime.interrupts import heed_signals
    from cispo.runtime.start_parts import StartParts

    StartParts.of_command = True
    # Python would search the libraries' half a million objects for garbage before it ends: nearly a second.
    atexit.register(gc.freeze)
    spare_writers()
    heed_signals()
    try:
        app(prog_name="cispo")
    finally:
        StartParts.of_command = False


if __name__ == "__main__":
    main()
