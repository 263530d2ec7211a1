"""How probable continuations are, where rows that begin alike share their beginning.

The answers to choose from stand after the same question. Such rows are a tree, each token of which
is read once: it sees its own row before it, at the place that it has there, and no other row.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from forgetless.models.state import base_of, evaluating
from forgetless.models.text import require_known_tokens, text_config
from forgetless.tasks.inference import Ids, accepts, by_tokens, device_of, pad, require_causal
from forgetless.tasks.journal import in_batches
from forgetless.tasks.logits import has_a_head, read, rows_of_logits, tokens_at_once

# Tokens of a tree. Each is compared with all the others, though it sees its own row only.
_TREE_TOKENS = 1024

Score = tuple[float, bool]
"""A log-probability, and whether it is of the greedy tokens."""

_TAKES_MASK = ("sdpa", "eager")
"""Kinds of attention that can be told what each token sees."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
"""What configs call the number of tokens that are seen, where it is not all."""


def continuation_logps(
    model: nn.Module,
    rows: Sequence[Ids],
    counts: Sequence[int],
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Score]:
    """Log-probability of the end of each row, in nats, and whether it is the greedy one.

        log p(end | beginning) = sum_t log p(x_t | x_<t)   over the tokens of the end

    Rows that begin alike share their beginning, if the model keeps them apart. That is tried on the
    largest of them; any other model reads row by row.

    Args:
        model: a causal language model.
        rows: token ids, two or more each.
        counts: tokens of each row's end, fewer than all.
        batch_size: groups of rows at once; None for as many as suit the model.
        dtype: of log-probabilities and their sum; None for that of the logits.

    Raises:
        UserError: not a causal language model, or tokens that it does not know.
    """
    require_causal(model)
    require_known_tokens(rows, model)
    inputs = [row[:-1] for row in rows]
    ends = [list(row[len(row) - count :]) for row, count in zip(rows, counts, strict=True)]

    def scores(trees: Sequence[_Tree]) -> dict[int, Score]:
        return _scores(model, trees, ends, dtype)

    def cut(trees: Sequence[_Tree]) -> list[list[_Tree]]:
        sizes = [len(tree.ids) for tree in trees]
        groups = by_tokens(sizes, tokens_at_once(model), batch_size)
        return [[trees[i] for i in group] for group in groups]

    with evaluating(model):
        width = getattr(text_config(model), "hidden_size", None) or 0
        batches = cut(_trees(inputs, range(len(rows)), width))
        known: dict[int, Score] | None = {}

        def tried(_: Sequence[int]) -> list[bool]:
            nonlocal known
            known = _kept_apart(model, forking[0], inputs, scores)
            return [known is not None]

        asked = [list(row) for row in rows]
        forking = [trees for trees in batches if any(tree.forks for tree in trees)]
        if forking:
            (shares,) = in_batches("beginnings", [asked], [[0]], tried)
            if not shares:
                batches = cut(_trees(inputs, range(len(rows)), 0))
        tree_of = {place: tree for trees in batches for tree in trees for place in tree.paths}

        def values(places: Sequence[int]) -> list[Score]:
            found = known if known and places[0] in known else None
            found = found or scores(list(dict.fromkeys(tree_of[place] for place in places)))
            return [found[place] for place in places]

        places = [[place for tree in trees for place in tree.paths] for trees in batches]
        found = in_batches("continuations", asked, places, values, list(counts))
    return [(value, bool(greedy)) for value, greedy in found]


class _Tree:
    """Rows that begin alike.

    Attributes:
        ids: every token once.
        depths: how many tokens of its row stand before each.
        paths: the place of each row -> where its tokens are in `ids`.
        forks: whether a row goes another way than one before it.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.paths: dict[int, list[int]] = {}
        self.forks = False

    def add(self, place: int, row: Ids, shared: int) -> None:
        """Put in a row whose first tokens are those of the row before it."""
        before = next(reversed(self.paths.values()), [])
        self.forks |= shared < len(before)
        self.paths[place] = [
            *before[:shared],
            *range(len(self.ids), len(self.ids) + len(row) - shared),
        ]
        self.ids += row[shared:]
        self.depths += range(shared, len(row))


def _trees(rows: Sequence[Ids], places: Sequence[int], width: int) -> list[_Tree]:
    """Rows in trees: those that begin alike are in one where that saves more than it costs.

    A token that two rows share is one pass through the layers less; a token of another row, which
    is masked, costs about 1 / width of one. With a width of 0 trees do not fork, and have rows each
    of which begins with the whole of the one before.
    """
    trees: list[_Tree] = []
    before: Ids = ()
    for place in sorted(places, key=lambda place: list(rows[place])):
        row, size = rows[place], len(trees[-1].ids) if trees else 0
        pairs = enumerate(zip(before, row, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(row)))
        new = len(row) - shared
        fits = size + new <= max(_TREE_TOKENS, len(row)) and shared * width > size * new
        if not trees or not (fits or shared == size):
            trees.append(_Tree())
            shared = 0
        trees[-1].add(place, row, shared)
        before = row
    return trees


def _kept_apart(
    model: nn.Module,
    trees: Sequence[_Tree],
    rows: Sequence[Ids],
    scores: Callable[[Sequence[_Tree]], dict[int, Score]],
) -> dict[int, Score] | None:
    """The scores of a batch of trees; None where rows alone have not the same ones.

    These are the longest of all, which are told alike what they see, and the longest with tokens of
    another row before its own: mostly one and the same.
    """
    config, largest = text_config(base_of(model)), max(len(tree.ids) for tree in trees)
    windows = [getattr(config, name, None) for name in _WINDOWS]
    sees_all = not any(isinstance(seen, int) and seen < largest for seen in windows)
    takes_mask = getattr(config, "_attn_implementation", None) in _TAKES_MASK
    if not (sees_all and takes_mask and accepts(model, "position_ids") and has_a_head(model)):
        return None
    try:
        together = scores(trees)
    except (ValueError, TypeError, RuntimeError, IndexError):  # its code expects another mask
        return None
    paths = [entry for tree in trees for entry in tree.paths.items()]
    lengths = [(len(path), path[-1] >= len(path), place) for place, path in paths]
    ends = {max(lengths)[-1], max(row for row in lengths if row[1])[-1]}
    near = math.sqrt(torch.finfo(_dtype(model)).eps)
    alone = scores(_trees(rows, sorted(ends), 0))
    same = (abs(together[i][0] - alone[i][0]) <= near * (1 + abs(alone[i][0])) for i in ends)
    return together if all(same) else None


def _scores(
    model: nn.Module, trees: Sequence[_Tree], ends: Sequence[Ids], dtype: torch.dtype | None
) -> dict[int, Score]:
    """Of every row of some trees, from one pass of the model."""
    longest = max(len(tree.ids) for tree in trees)
    rows = [place for tree in trees for place in tree.paths]
    places = [
        number * longest + i
        for number, tree in enumerate(trees)
        for place, path in tree.paths.items()
        for i in path[len(path) - len(ends[place]) :]
    ]
    # Where several rows go on from the same token, its logits are made once.
    asked, which = torch.unique(torch.tensor(places), return_inverse=True)
    said = torch.tensor([token for place in rows for token in ends[place]])
    logits_of, many = read(model, _batch(model, trees, longest)), rows_of_logits(model)
    order, logps, greedy = [], [], []
    for start in range(0, len(asked), many):
        own = ((which >= start) & (which < start + many)).nonzero().squeeze(1)
        found = logits_of(asked[start : start + many]).log_softmax(-1, dtype=dtype)
        at = (which[own] - start).to(found.device)
        logps.append(found[at, said[own].to(found.device)].cpu())
        greedy.append(found.argmax(-1)[at].cpu() == said[own])
        order.append(own)
    back = torch.cat(order).argsort()
    counts = [len(ends[place]) for place in rows]
    each = zip(
        torch.split(torch.cat(logps)[back], counts),
        torch.split(torch.cat(greedy)[back], counts),
        strict=True,
    )
    scores = [(float(values.sum()), bool(agrees.all())) for values, agrees in each]
    return dict(zip(rows, scores, strict=True))


def _batch(model: nn.Module, trees: Sequence[_Tree], longest: int) -> Mapping[str, Tensor]:
    """The inputs that say what each token of the trees sees, padded on the right."""
    device = device_of(model)
    batch = pad([tree.ids for tree in trees], 0, device)
    if not any(tree.forks for tree in trees):
        return batch
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)
    for tree, sees in zip(trees, seen, strict=True):
        for path in map(torch.tensor, tree.paths.values()):
            sees[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    dtype = _dtype(model)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    depths = pad([tree.depths for tree in trees], 0, device)["input_ids"]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": depths,
        "attention_mask": mask[:, None].to(device),
    }


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the numbers that go through a model."""
    found: torch.dtype = getattr(base_of(model), "dtype", torch.float32)
    return found
