"""A placement policy to start from: in each layer the busiest expert of the fullest rank changes places with the idlest of
the emptiest one. The contract, and every rule of it, is in `wit`.
"""

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.meta import Info, Issue
from wit_world.exports.placer import Change, Comparison, Move, Plan, Purpose
from wit_world.imports.types import Error_Decline, RankState

EMPTY = 4294967295


class Meta(exports.Meta):
    def describe(self):
        return Info(
            name="my-policy",
            version="0.1.0",
            summary="Swaps the busiest expert of the fullest rank with an idle one.",
            settings_schema='{"type":"object","additionalProperties":false}',
        )

    def validate(self, settings):
        if settings.strip() != "{}":
            message = f"got {settings}, expected {{}}: there are no settings"
            raise Err([Issue(path="", message=message)])


class Placer(exports.Placer):
    def decide(self, request):
        if not request.windows:
            raise Err(Error_Decline("no window has been counted yet"))
        changes = []
        for index, layer in enumerate(request.layers):
            if not affordable(request, len(changes) + 1):
                break
            change = improve(request, layer, load(request, index))
            if change is not None:
                changes.append(change)
        return Plan(changes, f"{len(changes)} of {len(request.layers)} layers change")


def affordable(request, layers):
    """Whether so many layers may change, with two moves in each. A plan beyond the budget is refused as a whole."""
    budget = request.budget
    wanted = [
        (budget.layers, layers),
        (budget.moves_per_layer, 2),
        (budget.bytes, 2 * layers * request.model.expert_bytes),
    ]
    return all(most is None or need <= most for most, need in wanted)


def load(request, index):
    """Rows of each expert of a layer, over all windows."""
    experts = request.model.experts
    rows = [window.load[index * experts : (index + 1) * experts] for window in request.windows]
    return [sum(of_expert) for of_expert in zip(*rows)]


def improve(request, layer, load):
    """The swap that brings the fullest rank down, or None."""
    placement = list(layer.placement)
    per_rank = request.topology.slots_per_rank
    # Rows of an expert are split evenly over its replicas.
    share = [0.0 if e == EMPTY else load[e] / placement.count(e) for e in placement]
    pinned = {pin.expert for pin in request.pins}
    ranks = range(len(request.topology.ranks))
    active = [r for r in ranks if request.topology.ranks[r].state == RankState.ACTIVE]

    def slots(rank):
        return range(rank * per_rank, (rank + 1) * per_rank)

    rows = [sum(share[slot] for slot in slots(rank)) for rank in ranks]

    def may_go(rank, to):
        taken = {placement[slot] for slot in slots(to)} | pinned | {EMPTY}
        return [slot for slot in slots(rank) if placement[slot] not in taken]

    full = max(active, key=rows.__getitem__, default=None)
    empty = min(active, key=rows.__getitem__, default=None)
    if full is None or empty is None:
        return None
    busy = max(may_go(full, empty), key=share.__getitem__, default=None)
    idle = min(may_go(empty, full), key=share.__getitem__, default=None)
    if busy is None or idle is None:
        return None
    gain = share[busy] - share[idle]
    if gain <= 0 or rows[empty] + gain >= rows[full]:
        return None
    mean = sum(rows) / len(rows)
    before = rows[full] / mean
    rows[full] -= gain
    rows[empty] += gain
    after = max(rows) / mean
    each = (before - after) / 2
    moves = [
        Move(placement[busy], full, empty, Purpose.SPREAD, each),
        Move(placement[idle], empty, full, Purpose.SPREAD, each),
    ]
    placement[busy], placement[idle] = placement[idle], placement[busy]
    return Change(layer.id, placement, moves, Comparison(before, after), None)
