"""Open Assistant's trees of messages, whole or as flat rows, as samples."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from alpaca_rlhf.utils.data.reading import Row
from alpaca_rlhf.utils.data.samples import (
    Sample,
    Unusable,
    number_of,
    sample_of,
    text_of,
    user_turn,
    value_of,
)
from alpaca_rlhf.utils.data.tokenizer import Message


def tree_samples(row: Row) -> Iterator[Sample | Unusable]:
    """One sample for each prompter's turn of an Open Assistant tree: its best and worst reply."""
    open_nodes: list[tuple[Any, list[Message]]] = [(row["prompt"], [])]
    while open_nodes:
        node, path = open_nodes.pop()
        try:
            turns = [*path, user_turn(_tree_text(node, "prompter"))]
        except Unusable as reason:
            yield reason
            continue
        replies, unusable = _tree_replies(node)
        yield from unusable
        try:
            language = node.get("lang") if isinstance(node.get("lang"), str) else None
            chosen, rejected = _best_and_worst_text(replies)
            yield sample_of(turns, chosen, rejected, history_is_trained=False, language=language)
        except Unusable as reason:
            yield reason
        for reply in reversed(replies):
            said = {"role": "assistant", "content": reply["text"].strip()}
            below = reply.get("replies") or []
            more = below if isinstance(below, list) else []
            open_nodes += [(child, [*turns, said]) for child in reversed(more)]


def _tree_text(node: Any, role: str) -> str:
    if value_of(node, "deleted", "message"):
        raise Unusable("deleted message")
    if node.get("role") != role:
        raise Unusable("roles out of order")
    return text_of(node.get("text"), "message")


def _tree_replies(node: Row) -> tuple[list[Row], list[Unusable]]:
    """The usable replies to a turn, best first, those without a rank last; and the others."""
    below = node.get("replies")
    usable, others = [], []
    for reply in below if isinstance(below, list) else []:
        try:
            _tree_text(reply, "assistant")
            usable.append(reply)
        except Unusable as reason:
            others.append(reason)
    return sorted(usable, key=lambda reply: _rank(reply, math.inf)), others


def _rank(reply: Row, otherwise: float) -> float:
    try:
        return number_of(reply.get("rank"), "rank")
    except Unusable:
        return otherwise


def _best_and_worst_text(replies: list[Row]) -> tuple[str, str | None]:
    if not replies:
        raise Unusable("prompt without a reply")
    ranked = [reply for reply in replies if _rank(reply, math.inf) != math.inf]
    if len(ranked) > 1 and _rank(ranked[0], 0) != _rank(ranked[-1], 0):
        return ranked[0]["text"], ranked[-1]["text"]
    return replies[0]["text"], None


def trees_of_messages(rows: Iterable[Row]) -> Iterator[Row | Unusable]:
    """Open Assistant's flat messages -> trees; what hangs on no root is counted."""
    nodes: dict[str, Row] = {}
    below: dict[str, list[str]] = {}
    for row in rows:
        name, parent = row.get("message_id"), row.get("parent_id")
        if not isinstance(name, str) or not name or not isinstance(parent, str | None):
            yield Unusable("message_id or parent_id is not text")
        elif name in nodes:
            yield Unusable("message_id occurs twice")
        else:
            nodes[name] = {**row, "replies": []}
            below.setdefault(parent or "", []).append(name)
    for parent, children in below.items():
        if parent in nodes:
            nodes[parent]["replies"] += [nodes[child] for child in children]
    roots = below.get("", [])
    for name in roots:
        yield {"prompt": nodes[name]}
    orphans = [c for p, children in below.items() if p and p not in nodes for c in children]
    lost = _reached(orphans, below)
    yield from (Unusable("parent message is missing") for _ in lost)
    circling = len(nodes) - len(lost) - len(_reached(roots, below))
    yield from (Unusable("tree cycle") for _ in range(circling))


def _reached(start: list[str], below: dict[str, list[str]]) -> set[str]:
    reached, waiting = set(start), list(start)
    while waiting:
        new = [child for child in below.get(waiting.pop(), []) if child not in reached]
        reached.update(new)
        waiting += new
    return reached
