"""The verbs that measure: eval, and compare with its limits."""

from pathlib import Path
from typing import Annotated

import typer

from forgetless.cli.options import Base, Dtype, Items
from forgetless.cli.screen import begin, tell_terminal
from forgetless.cli.tables import print_comparison, print_measurement
from forgetless.cli.values import learned_among, task_specs
from forgetless.core.errors import UserError


def eval_(
    context: typer.Context,
    base: Base,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between (see 'forgetless tasks'), kind:file, or YAML."
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="An adapter, a run or a trained model to compare.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples in a prompt; the task's own number.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; the task's own number.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="auto, or off for prompts as they stand; each task's own default."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, by the template.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with the standard tasks' data in local files.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts at once; it does not change the scores.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder of the scores measured before; the user's cache.")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run what the model programs, in a sandbox."),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(help="JSON file: {task: {metric: {value, stderr, n}}}; the base's beside it."),
    ] = None,
    page: Annotated[
        str | None,
        typer.Option("--report", help="Folder for a page of what the adapter lost and learned."),
    ] = None,
    learning: Annotated[
        str,
        typer.Option(
            metavar="TASKS", help="Those of the tasks that were to be learned, for --report."
        ),
    ] = "",
    items: Items = 10,
    dtype: Dtype = "auto",
) -> None:
    """Score a base, and an adapter on it, on tasks."""
    from forgetless.cli.commands.folders import require_file
    from forgetless.cli.commands.measuring import measure, write_scores
    from forgetless.core.files import require_place
    from forgetless.tasks import make_tasks

    if out is not None:
        require_file(Path(out))
    if page is not None:
        require_place(Path(page) / "index.html")
    if page is not None and adapter is None:
        raise UserError("--report shows an adapter against its base; give --adapter too")
    if learning and page is None:
        raise UserError("--learning is about the page of --report; give --report too")
    begin()
    specs = task_specs(
        tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        system=system,
        data_dir=data_dir,
        allow_code_execution=allow_code_execution or None,
    )
    asked = make_tasks(specs)
    learned = learned_among(asked, learning)
    found = measure(
        base,
        asked,
        adapter=adapter,
        dtype=dtype,
        batch_size=batch_size,
        cache=cache,
        listen=tell_terminal,
    )
    print_measurement(found, items)
    if out is not None:
        write_scores(found, Path(out))
    if page is not None and adapter is not None and found.adapted is not None:
        from forgetless.reports import report, write_evaluation

        write_evaluation(
            page, base, adapter, found.base, found.adapted, learning=learned, command=context.obj
        )
        print(f"report: {report(page)}")


def compare(
    base_scores: Annotated[
        str,
        typer.Argument(metavar="BASE_SCORES", help="A file of 'eval --out', or a run (its base)."),
    ],
    scores: Annotated[
        str | None,
        typer.Argument(metavar="SCORES", help="Likewise, or a run; the same run if left out."),
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Exit with 1 if a task lost more: 0.02 (points), 5% (of the base), TASK=0.05.",
        ),
    ] = None,
    certain: Annotated[
        bool, typer.Option("--certain", help="Only if the whole interval is beyond the limit.")
    ] = False,
    items: Items = 10,
    json: Annotated[str | None, typer.Option(help="JSON file for all of it.")] = None,
    junit: Annotated[str | None, typer.Option(help="JUnit XML file: a test case a task.")] = None,
) -> None:
    """Show what was lost and gained between two scorings, and fail if it is too much."""
    from forgetless.core.files import write_json, write_text
    from forgetless.scores import gates
    from forgetless.scores.comparison import compare as do
    from forgetless.scores.files import read_scores

    limits = gates.parse_limits(max_drop or [])
    if scores is None and Path(base_scores).is_file():
        raise UserError(f"give the scores to compare with {base_scores}; only a run has both")
    before = read_scores(base_scores, "base")
    after = read_scores(base_scores if scores is None else scores, "final")
    comparison = do(before.scores, after.scores)
    learning = before.learning | after.learning
    judged = gates.judge(comparison, limits, learning=learning, certain=certain)
    print_comparison(comparison, items)
    if limits:
        print("\n" + gates.verdict(judged))
    if json is not None:
        write_json(Path(json), {**comparison.to_json(), "gate": gates.to_json(judged)})
    if junit is not None:
        write_text(Path(junit), gates.junit(judged))
    if any(judgement.failed for judgement in judged):
        raise typer.Exit(1)
