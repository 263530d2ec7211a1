"""The verbs for what is done: merge, chat, push, clean."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from forgetless.cli.options import AsJson, Dtype, NewFolder
from forgetless.cli.screen import begin
from forgetless.cli.tables import print_json, print_table, print_text

Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_ADAPTER",
        help="Its folder, or its name on the hub; of 'chat' a tuned model's too.",
    ),
]
OfBase = Annotated[str | None, typer.Option("--base", help="The base, where it is not recorded.")]


def merge(
    source: Source,
    out: NewFolder,
    base: OfBase = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the base with the adapter added to its weights, as an ordinary model folder."""
    from forgetless.cli.commands.sharing import KL_OF_ANOTHER_BASE, merge_adapter

    begin()
    merged = merge_adapter(source, out, base, dtype)
    if as_json:
        print_json(asdict(merged))
        return
    print(f"{out}: an ordinary model folder; the adapter is in {len(merged.layers)} of its weights")
    stored, four_bits = merged.stored, merged.four_bits
    print_text(
        f"Read back, its logits differ from the adapter's by at most {merged.difference:.2g}. The "
        f"weights keep the base's number format: {_percent(1 - stored.kept)} of the update "
        f"vanished in rounding, whose error is {stored.error:.2g} of the update's size."
    )
    if stored.kept < 0.9:
        print_text(
            "Merge with --dtype float32, or serve the adapter beside the base, to keep all of it."
        )
    print_text(
        f"Stored in 4 bits (nf4) it would keep {_percent(four_bits.kept)} of the update, under an "
        f"error of {four_bits.error:.2g} times its size; --json has both by layer."
    )
    if merged.kl is not None:
        print_text(
            "This is not the base that the adapter was trained on: between the two, with it on, "
            f"lie {merged.kl:.2g} nats per token"
            + (", which is much; measure both." if merged.kl > KL_OF_ANOTHER_BASE else ".")
        )


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.1f} %"


def chat(
    source: Source,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; without it, every line that is typed.")
    ] = None,
    base: OfBase = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, for a template.")] = None,
    template: Annotated[
        str, typer.Option(help="auto: the tokenizer's chat template where it has one; or off.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask the base and the adapter the same, and show both greedy answers side by side."""
    from forgetless.cli.commands.sharing import Pair

    begin()
    pair = Pair.load(source, base, dtype)
    asked = [prompt] if prompt is not None else map(str.strip, sys.stdin)
    if prompt is None and sys.stdin.isatty() and not as_json:
        print_text("One question a line; an empty line ends.")
    for question in asked:
        if not question:
            break
        before, after = pair.answers(question, max_new_tokens, template, system)
        if as_json:
            answer = {"prompt": question, "base": before, "adapter": after}
            print_json(answer, indent=None if prompt is None else 2)  # of many each is a line
        else:
            print_table(["base", "adapter"], [[before, after]])


def push(
    source: Source,
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Such as me/my-adapter.")],
    private: Annotated[bool, typer.Option("--private", help="For a repository made anew.")] = False,
    base: OfBase = None,
) -> None:
    """Upload an adapter as a plain PEFT LoRA with its card to the Hugging Face hub."""
    from forgetless.cli.commands.sharing import push_adapter

    begin()
    print(push_adapter(source, repository, private=private, base=base))


def clean(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Of studies, or of one.")
    ] = "runs",
    delete: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Delete this part of every study, such as spectra."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what studies keep for their next runs, the largest first, and delete parts of it."""
    from forgetless.cli.commands.sharing import delete_parts, kept_parts
    from forgetless.recipes.plan.plan import show_bytes

    parts = kept_parts(Path(folder))
    if delete:
        parts = delete_parts(parts, delete)
    if as_json:
        print_json([part.to_json() for part in parts])
        return
    verb = "deleted" if delete else "kept"
    rows = [[p.name, show_bytes(p.size), p.study.name, p.restored] for p in parts]
    print_table(["part", "size", "study", "made again"], rows, ["size"])
    print_text(
        f"{verb}: {show_bytes(sum(part.size for part in parts))}"
        + ("" if delete or not parts else f"; --delete {parts[0].name} deletes a part")
    )
