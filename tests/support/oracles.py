import itertools
import math

import numpy as np


def best_choice(costs, errors, budget):
    """The least summed error over all assignments within the budget, None when there is none."""
    best = None
    for choice in itertools.product(*[range(len(cost)) for cost in costs]):
        spent = sum(cost[option] for cost, option in zip(costs, choice, strict=True))
        lost = sum(error[option] for error, option in zip(errors, choice, strict=True))
        if spent <= budget and (best is None or lost < best):
            best = lost
    return best


def owned(units, width):
    """The columns of some units."""
    return [unit * width + column for unit in units for column in range(width)]


def refitted(x, weight, kept, pull=None):
    """Least squares on the `kept` columns of the data, with a free constant, near `weight`.

    `x` is [samples, in], `pull` [in] what a squared change of each column costs. Gives the weight of the
    kept columns, the change of the bias, and the mean squared output error.
    """
    middle = x - x.mean(0)
    root = np.sqrt(np.zeros(x.shape[1]) if pull is None else pull)
    rows = np.concatenate([middle / math.sqrt(len(x)), np.diag(root)])
    found = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)[0].T
    lost = middle @ weight.T - middle[:, kept] @ found.T
    shift = (x @ weight.T - x[:, kept] @ found.T).mean(0)
    return found, shift, float((lost**2).sum(1).mean())


def objective(x, weight, kept, pull):
    """What the best refit on the kept columns leaves, changes of the weight included."""
    found, _, error = refitted(x, weight, kept, pull)
    change = weight.copy()
    change[:, kept] -= found
    return error + float((change**2 @ pull).sum())


def greedy_removals(x, weight, width, pull):
    """Units in the order in which the one that costs least goes, every subset solved anew."""
    left, gone = list(range(x.shape[1] // width)), []
    while left:
        cost = [objective(x, weight, owned([u for u in left if u != out], width), pull) for out in left]
        gone.append(left.pop(cost.index(min(cost))))
    return gone


def best_subset(x, weight, units, width, pull):
    """The least objective over all sets of that many units, and the set."""
    everything = itertools.combinations(range(x.shape[1] // width), units)
    return min((objective(x, weight, owned(kept, width), pull), kept) for kept in everything)


def softmax(values):
    """Probabilities of a list of numbers."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def cosine(first, second):
    """The cosine of the angle between two vectors."""
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def spearman(first, second):
    """Pearson's correlation of ranks; equal values get the mean of the ranks they take up."""

    def ranks(values):
        return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]

    a, b = ranks(list(first)), ranks(list(second))
    a, b = [x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b]
    return cosine(a, b)


def feed_forward_work(hidden, width, rows, width_bytes):
    """Operations and bytes of x @ up, then h @ down, counted one product at a time."""
    flops = moved = 0
    for inner, out in ((hidden, width), (width, hidden)):
        for _ in range(rows):
            flops += out * (2 * inner)
        moved += (rows * inner + inner * out + rows * out) * width_bytes
    return flops, moved


def attention_flops(batch, heads, tokens, width):
    """Operations of scores and context, counted one query at a time."""
    flops = 0
    for _ in range(batch * heads):
        for _ in range(tokens):
            flops += tokens * 2 * width  # scores against every key
            flops += width * 2 * tokens  # the weighted sum of values
    return flops


def steps_of_a_tenth(width, least):
    """How many different widths there are when each is nine tenths of the last, rounded."""
    found, exact = [], float(width)
    while round(exact) >= least:
        if round(exact) not in found:
            found.append(round(exact))
        exact *= 0.9
    return len(found)


def staircase(times):
    """Levels for which every wider level is slower."""
    kept = {}
    for level in sorted(times, reverse=True):
        if all(times[level] < times[wider] for wider in times if wider > level):
            kept[level] = times[level]
    return kept


def unit_energy(weight, second, width):
    """Squared writer columns weighted by the second moment of their inputs, summed over each unit."""
    scores = [0.0] * (len(second) // width)
    for row in weight:
        for column, value in enumerate(row):
            scores[column // width] += value * value * second[column]
    return scores


def normalized(rows, scale, shift, epsilon=1e-5):
    """Layer norm, one row at a time."""
    found = []
    for row in rows:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        scaled = [(value - mean) / math.sqrt(variance + epsilon) for value in row]
        found.append([v * a + b for v, a, b in zip(scaled, scale, shift, strict=True)])
    return found


def masked_attention(query, key, value, mask, units, queries, width):
    """The context of every row, `[batch * tokens, units * queries * width]`, one query at a time."""
    batch, tokens = mask.shape[0], mask.shape[-1]
    found = [[0.0] * (units * queries * width) for _ in range(batch * tokens)]
    for b in range(batch):
        for head in range(units * queries):
            group = head // queries
            for i in range(tokens):
                asks = query[b * tokens + i][head * width : (head + 1) * width]
                scores = []
                for j in range(tokens):
                    answers = key[b * tokens + j][group * width : (group + 1) * width]
                    dot = sum(a * c for a, c in zip(asks, answers, strict=True))
                    scores.append(dot / math.sqrt(width) + float(mask[b, 0, i, j]))
                for k in range(width):
                    found[b * tokens + i][head * width + k] = sum(
                        p * value[b * tokens + j][group * width + k] for j, p in enumerate(softmax(scores))
                    )
    return found


def supported(x, weight, mask, pull=None):
    """Least squares of every row on its own inputs: `mask` is a list of lists of input numbers.

    Gives the weight with zeros in place, the change of the bias, and the mean squared output error.
    """
    found = np.zeros_like(weight)
    for row, kept in enumerate(mask):
        if len(kept):
            found[row, kept] = refitted(x, weight[[row]], list(kept), pull)[0][0]
    middle = x - x.mean(0)
    lost = middle @ (weight - found).T
    return found, (x @ (weight - found).T).mean(0), float((lost**2).sum(1).mean())


def penalized(x, change, pull):
    """The mean squared output of a change of weight, and what the change itself costs."""
    return float((((x - x.mean(0)) @ change.T) ** 2).sum(1).mean()) + float((change**2 @ pull).sum())
