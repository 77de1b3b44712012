"""Replies that cannot be averaged with those of most clients: another part of the model is sent,
under another name, or with other metrics."""

from collections import Counter
from collections.abc import Mapping

from tracefl.federation.replies import Update, as_line


def unlike(updates: Mapping[str, Update], everything: bool) -> dict[str, str]:
    """Who sends something else than most clients.

    Clients may send part of the model, but all the same. Where as many clients send one thing as
    another, it is the larger, or else the first, that counts.

    Args:
        updates: client -> its update, in the clients' order.
        everything: compare names of records and metrics too, which Flower's own strategies need.

    Returns:
        Client -> why its update cannot be used.
    """
    found = dict[str, str]()
    for describe in (_entries, _records, _metrics) if everything else (_entries,):
        has = {client: describe(update) for client, update in updates.items() if client not in found}
        count = Counter(frozenset(what) for what in has.values())
        usual = max(count, key=lambda what: (count[what], len(what)), default=frozenset[str]())
        one = next((client for client, what in has.items() if what.keys() == usual), "")
        for client, what in has.items():
            if odd := sorted(what.keys() - usual) or sorted(usual - what.keys()):
                most = count[usual] > count[frozenset(what)]
                others = "those of most clients" if most else f"that of client {one}"
                told = what[odd[0]] if odd[0] in what else has[one][odd[0]]
                whose, thing = told.split(" ", 1)
                found[client] = f"its {whose} {'has' if odd[0] in what else 'lacks'} {thing}, unlike {others}"
    return found


def _entries(update: Update) -> dict[str, str]:
    return {name: f"model '{as_line(name)}'" for name in update.state}


def _records(update: Update) -> dict[str, str]:
    return {f"{kind} {name}": f"reply a record of {kind} '{as_line(name)}'" for kind, name in update.records}


def _metrics(update: Update) -> dict[str, str]:
    """Lists are averaged with lists of their length."""
    lists = {name: f", a list of {len(of)}" if isinstance(of, list) else "" for name, of in update.metrics.items()}
    return {f"{name}{of}": f"reply the metric '{as_line(name)}'{of}" for name, of in lists.items()}
