// A placement policy to start from: in each layer the busiest expert of the fullest rank changes places with the idlest of
// the emptiest one. The contract, and every rule of it, is in `wit`.

// componentize-qjs 0.4 carries numbers of 32 bits as signed ones: 4294967295, an empty slot, is -1 here.
const EMPTY = -1;

export const meta = {
  describe() {
    return {
      name: 'my-policy',
      version: '0.1.0',
      summary: 'Swaps the busiest expert of the fullest rank with an idle one.',
      settingsSchema: '{"type":"object","additionalProperties":false}',
    };
  },

  validate(settings) {
    if (settings.trim() !== '{}') {
      // What a function throws is the error of its result.
      throw [{ path: '', message: `got ${settings}, expected {}: there are no settings` }];
    }
  },
};

export const placer = {
  decide(request) {
    if (request.windows.length === 0) {
      throw { tag: 'decline', val: 'no window has been counted yet' };
    }
    const changes = [];
    for (const [index, layer] of request.layers.entries()) {
      if (!affordable(request, changes.length + 1)) break;
      const change = improve(request, layer, load(request, index));
      if (change !== null) changes.push(change);
    }
    return { changes, explanation: `${changes.length} of ${request.layers.length} layers change` };
  },
};

/** Whether so many layers may change, with two moves in each. A plan beyond the budget is refused as a whole. */
function affordable({ budget, model }, layers) {
  // 64-bit numbers are BigInt.
  const bytes = 2n * BigInt(layers) * BigInt(model.expertBytes);
  return (
    layers <= (budget.layers ?? Infinity) &&
    2 <= (budget.movesPerLayer ?? Infinity) &&
    (budget.bytes === undefined || budget.bytes === null || bytes <= budget.bytes)
  );
}

/** Rows of each expert of a layer, over all windows. */
function load({ windows, model }, index) {
  const rows = new Array(model.experts).fill(0);
  for (const window of windows) {
    for (let expert = 0; expert < model.experts; expert += 1) {
      rows[expert] += window.load[index * model.experts + expert];
    }
  }
  return rows;
}

/** The swap that brings the fullest rank down, or null. */
function improve(request, layer, load) {
  const { ranks, slotsPerRank } = request.topology;
  const placement = Array.from(layer.placement, (expert) => expert | 0);
  const replicas = new Map();
  for (const expert of placement) replicas.set(expert, (replicas.get(expert) ?? 0) + 1);
  // Rows of an expert are split evenly over its replicas.
  const share = placement.map((e) => (e === EMPTY ? 0 : load[e] / replicas.get(e)));
  const slots = (rank) => Array.from({ length: slotsPerRank }, (_, slot) => rank * slotsPerRank + slot);
  const rows = ranks.map((_, rank) => slots(rank).reduce((sum, slot) => sum + share[slot], 0));
  const active = ranks.flatMap((rank, number) => (rank.state === 'active' ? [number] : []));
  if (active.length === 0) return null;
  const full = active.reduce((a, b) => (rows[b] > rows[a] ? b : a));
  const empty = active.reduce((a, b) => (rows[b] < rows[a] ? b : a));
  const pinned = new Set(request.pins.map((pin) => pin.expert));
  const mayGo = (slot, to) =>
    placement[slot] !== EMPTY &&
    !pinned.has(placement[slot]) &&
    !slots(to).some((taken) => placement[taken] === placement[slot]);
  const byShare = (a, b) => share[a] - share[b];
  const busy = slots(full).filter((slot) => mayGo(slot, empty)).sort(byShare).pop();
  const idle = slots(empty).filter((slot) => mayGo(slot, full)).sort(byShare).shift();
  if (busy === undefined || idle === undefined) return null;
  const gain = share[busy] - share[idle];
  if (gain <= 0 || rows[empty] + gain >= rows[full]) return null;
  const mean = rows.reduce((sum, n) => sum + n, 0) / rows.length;
  const before = rows[full] / mean;
  rows[full] -= gain;
  rows[empty] += gain;
  const after = Math.max(...rows) / mean;
  const step = (slot, source, destination) => ({
    expert: placement[slot],
    source,
    destination,
    purpose: 'spread',
    gain: (before - after) / 2,
  });
  const moves = [step(busy, full, empty), step(idle, empty, full)];
  [placement[busy], placement[idle]] = [placement[idle], placement[busy]];
  return { layer: layer.id, placement, moves, maxOverMean: { before, after }, milliseconds: undefined };
}
