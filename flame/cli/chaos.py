"""``flame chaos``: kill, pause and cut off the parts of a job on purpose, and see that it goes on."""

from __future__ import annotations

from pathlib import Path

import click

from flame.cli.app import CONTEXT, FAILED, examples, output_option, set_option


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame chaos examples/digits --kill aggregator@round=3 --kill server@upload --pause trainer/2 20s --seed 7",
        "flame chaos examples/digits --compare",
        "flame chaos JOB_ID --cut trainer@train=2 -o json",
    ),
)
@click.argument("job")
@click.option("--kill", "kills", metavar="WHO[@WHEN]", multiple=True, help="SIGKILL.")
@click.option(
    "--pause",
    "pauses",
    metavar="WHO[@WHEN] TIME",
    multiple=True,
    nargs=2,
    help="SIGSTOP, and SIGCONT after TIME, such as 20s.",
)
@click.option("--cut", "cuts", metavar="WHO[@WHEN]", multiple=True, help="End all its connections at once.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws what is left open, the same each time.")
@click.option(
    "--compare", is_flag=True, help="Run the job without a disturbance first, and compare the models to the bit."
)
@click.option(
    "--computes",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with computes for the private server, as `flame serve` takes it.",
)
@set_option
@output_option
def chaos(  # noqa: PLR0917 - click gives them by name
    job: str,
    kills: tuple[str, ...],
    pauses: tuple[tuple[str, str], ...],
    cuts: tuple[str, ...],
    seed: int,
    compare: bool,
    computes: Path | None,
    overrides: tuple[str, ...],
    how: str,
) -> int:
    """Disturb JOB on purpose and see whether it goes on by itself.

    JOB is a job folder or a job file, which gets a private server; or the id of a job on the server of this machine, which must have been started
    with FLAME_CHAOS=FOLDER in its environment. Options can be given several times; with none of them three kills are drawn.

    \b
    WHO   a role, ROLE/NUMBER (from 0), server, or flamelet: the agent over the task's code
    WHEN  round=N, or a phase: start, deploy, distribute, train, upload, aggregate, save, stop;
          or PHASE=N for round N. It is drawn where it is left out.

    What it reaches: workers that are processes of this machine, in containers of Docker engines, and in pods of clusters whose credentials are on
    this machine; not those of participants. In a container or pod, flamelet is what keeps it running. Connections are cut in a container by root on
    the engine's machine alone, and in pods not at all; workers in containers of an engine elsewhere do not come to a WHEN. The exit status is 0 only if the job completed, and with --compare with the same model.
    """
    from flame.chaos import interrupt
    from flame.chaos.plan import duration
    from flame.chaos.trial import Trial, Wanted
    from flame.cli import output
    from flame.errors import UsageError

    wanted = [Wanted("kill", who) for who in kills]
    wanted += [Wanted("pause", who, duration(time)) for who, time in pauses]
    wanted += [Wanted("cut", who) for who in cuts]
    trial = Trial(wanted, seed, output.note)
    if Path(job).exists():
        outcome = interrupt.run(trial.of_files(job, overrides, compare=compare, computes=computes))
    elif overrides or compare or computes:
        raise UsageError(
            f"There is no file {job}; --set, --compare and --computes are for a job that is given by its files."
        )
    else:
        outcome = interrupt.run(trial.of_job(job))

    def table() -> None:
        output.table(
            ["deed", "done", "what"], [[one.deed, "yes" if one.done else "no", one.what] for one in outcome.deeds]
        )
        click.echo()
        model = {None: None, True: "the same to the bit", False: "another one"}[outcome.same_model]
        facts: list[tuple[str, object]] = [
            ("job", outcome.job),
            ("state", outcome.state.value),
            ("rounds", outcome.rounds),
            ("model", model),
            ("reason", outcome.message),
            ("seed", outcome.seed),
        ]
        output.facts(facts)

    output.show(outcome, how, table)
    return 0 if outcome.survived else FAILED
