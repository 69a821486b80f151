"""The command line. Only names and help live here: `cispo --help` must answer before torch could be imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")

app = typer.Typer(
    name="cispo",
    help="RL post-training for lightning-attention and mixture-of-experts language models.",
    no_args_is_help=True,
    add_completion=False,
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


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last run of that name, from its newest checkpoint.")
    ] = False,
) -> None:
    """Run a recipe: supervised warm-up if it has one, then reinforcement learning."""
    from cispo.commands.train import train

    _run(train, recipe, overrides or [], resume=resume)


@app.command()
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
    parallel: Annotated[int | None, typer.Option(min=1, help="Runs side by side; as many as fit by default.")] = None,
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

    _run(
        compare,
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
def sft(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run only the supervised warm-up of a recipe and save the policy."""
    from cispo.commands.train import sft

    _run(sft, recipe, overrides or [])


@app.command()
def evaluate(recipe: RecipeArgument, overrides: Overrides = None, checkpoint: Checkpoint = None) -> None:
    """Measure sampling accuracy on the held-out prompts."""
    from cispo.commands.evaluate import evaluate_checkpoint

    _run(evaluate_checkpoint, recipe, overrides or [], checkpoint)


@app.command()
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

    _run(generate, recipe, overrides or [], prompt=prompt, checkpoint=checkpoint, number=n, columns=column or [])


@app.command()
def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the resolved recipe, the algorithm in words, and the process and memory plan."""
    from cispo.commands.show import show

    _run(show, recipe, overrides or [])


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="A new folder.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write a checkpoint as a Hugging Face model folder."""
    from cispo.commands.evaluate import export

    _run(export, checkpoint, to, dtype)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help=_RECIPE, show_default=False)] = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Check versions, devices, the lightning op against its reference, and sampler/learner parity of a recipe."""
    from cispo.commands.doctor import doctor

    _run(doctor, recipe, overrides or [], checkpoint)


def _run(command: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Bad input is one sentence and exit code 2, a run that broke is one and code 1, an interrupt is code 130."""
    from cispo.errors import RunError, UserError

    try:
        command(*args, **kwargs)
    except UserError as error:
        print(f"cispo: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"cispo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("cispo: interrupted", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Entry point of the `cispo` command."""
    app()


if __name__ == "__main__":
    main()
