"""Is one system better than another, or is it the choice of queries? Paired tests on the values of each query.

The randomisation test is Fisher's, as Smucker, Allan and Carterette (CIKM 2007) recommend for retrieval; Student's
paired t-test agrees with it closely on samples of that size and gives the interval. Several comparisons are corrected
by Holm (1979) or Bonferroni.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError


PerQuery = Mapping[str, Mapping[str, float]]

CORRECTIONS = ("holm", "bonferroni", "none")

# Signs that are held at once: 4 MiB of them.
_BLOCK = 2**22


@dataclass(frozen=True)
class TTest:
    """Student's paired t-test.

    Args:
        p_value: Two-sided.
        statistic: t.
        interval: Confidence interval of the mean difference.
        effect_size: Cohen's d of paired samples: mean difference over the standard deviation of the differences.
    """

    p_value: float
    statistic: float
    interval: tuple[float, float]
    effect_size: float


@dataclass(frozen=True)
class Comparison:
    """One system against a baseline, on one measure.

    Args:
        measure: Its name.
        baseline, system: Names.
        n_queries: Queries that both were measured on.
        baseline_mean, system_mean: Means over them.
        difference: `system_mean - baseline_mean`.
        interval: Confidence interval of the difference, by t.
        effect_size: Cohen's d of paired samples; infinite where all queries differ by the same amount.
        wins, losses, ties: Queries on which the system is better, worse, equal.
        p_randomization, p_t_test: Two-sided p-values.
        p_randomization_adjusted, p_t_test_adjusted: Corrected for the number of comparisons on this measure.
        significant: Whether the corrected p-value of the randomisation test is at most alpha.
    """

    measure: str
    baseline: str
    system: str
    n_queries: int
    baseline_mean: float
    system_mean: float
    difference: float
    interval: tuple[float, float]
    effect_size: float
    wins: int
    losses: int
    ties: int
    p_randomization: float
    p_t_test: float
    p_randomization_adjusted: float
    p_t_test_adjusted: float
    significant: bool


def paired_randomization_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    samples: int = 100_000,
    seed: int = 0,
) -> float:
    """The two-sided p-value of the mean difference when every query's two values may be swapped.

    Exact over all swaps where there are at most `samples` of them, which is up to 16 queries that differ by default
    (equal ones do not matter); else of `samples` random ones, the observed one counted in, so that it is never 0.

    Args:
        first, second: `float[n]`, the values of the same queries.
        samples: Random swaps; memory does not grow with them.
        seed: Of the swaps.

    Raises:
        InputError: If the lengths differ, or there are fewer than 2 queries.
    """
    differences = _differences(first, second)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    # A swap set S turns the sum of differences D into D - 2 * sum(S): a product with a matrix of zeros and ones.
    total = differences.sum()
    # Sums of the same numbers in another order differ in their last bits, and count as equal.
    least = abs(total) - 1e-12 * np.abs(differences).sum()
    exact = len(differences) < 63 and 2 ** len(differences) <= samples
    count = 2 ** len(differences) if exact else samples
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(differences))
    extreme = 0
    for start in range(0, count, rows):
        size = min(rows, count - start)
        if exact:
            number = np.arange(start, start + size)[:, None]
            swaps = number >> np.arange(len(differences)) & 1
        else:
            bits = generator.integers(0, 256, (size, -(-len(differences) // 8)), dtype=np.uint8)
            swaps = np.unpackbits(bits, axis=1, count=len(differences))
        extreme += int((np.abs(total - 2 * (swaps.astype(np.float64) @ differences)) >= least).sum())
    return extreme / count if exact else (extreme + 1) / (count + 1)


def paired_t_test(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, confidence: float = 0.95
) -> TTest:
    """Student's two-sided paired t-test of `second - first`.

    Args:
        first, second: `float[n]`, the values of the same queries.
        confidence: Of the interval.

    Raises:
        InputError: If the lengths differ, or there are fewer than 2 queries.
    """
    from scipy.special import stdtr, stdtrit

    differences = _differences(first, second)
    n, mean, deviation = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if deviation <= 1e-12 * abs(mean) or deviation == 0:
        # Every query differs by the same amount: by nothing, or beyond doubt.
        endless = math.copysign(math.inf, mean) if mean else 0.0
        return TTest(0.0 if mean else 1.0, endless, (mean, mean), endless)
    error = deviation / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    p_value = float(2 * stdtr(n - 1, -abs(mean / error)))
    return TTest(p_value, mean / error, (mean - half, mean + half), mean / deviation)


def adjust_p_values(p_values: Sequence[float], method: str = "holm") -> list[float]:
    """P-values corrected for their number, so that the chance of any false claim among them stays below alpha.

    Args:
        p_values: Of one family of comparisons.
        method: `"holm"` (never weaker than Bonferroni), `"bonferroni"` or `"none"`.

    Raises:
        InputError: For another method.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if method not in CORRECTIONS:
        raise InputError(f"unknown correction {method!r}", cure=f"Choose one of {', '.join(CORRECTIONS)}")
    if method == "holm":
        order = np.argsort(values, kind="stable")
        steps = values[order] * np.arange(len(values), 0, -1)
        values = np.empty_like(values)
        values[order] = np.maximum.accumulate(steps)
    elif method == "bonferroni":
        values = values * len(values)
    return np.minimum(values, 1.0).tolist()


def average_seeds(systems: Mapping[str, PerQuery]) -> dict[str, dict[str, dict[str, float]]]:
    """Systems `name@seed` as one system `name`: the mean of each query's values over the seeds.

    Repetitions of one system are no further queries; without this step they would be counted as such.

    Raises:
        InputError: If two seeds of a system were measured on different queries or by different measures.
    """
    groups: dict[str, dict[str, PerQuery]] = {}
    for name, values in systems.items():
        groups.setdefault(name.partition("@")[0], {})[name] = values
    result = {}
    for base, seeds in groups.items():
        _check_same_queries(seeds)
        first = next(iter(seeds.values()))
        measures = [measure for measure in _measures(first) if all(measure in _measures(s) for s in seeds.values())]
        result[base] = {
            query: {measure: math.fsum(s[query][measure] for s in seeds.values()) / len(seeds) for measure in measures}
            for query in first
        }
    return result


def compare_systems(
    systems: Mapping[str, PerQuery],
    measures: Sequence[str] | None = None,
    *,
    baseline: str | None = None,
    all_pairs: bool = False,
    correction: str = "holm",
    alpha: float = 0.05,
    samples: int = 100_000,
    seed: int = 0,
) -> list[Comparison]:
    """Compares every system with a baseline, or all with each other, measure by measure.

    The comparisons on one measure are one family for the correction.

    Args:
        systems: name -> query id -> measure -> value, of the same queries (seeds averaged, see [`average_seeds`]).
        measures: Which; by default those that all systems have.
        baseline: A name; by default the first system.
        all_pairs: Compare every two systems instead; the earlier one is the baseline.
        correction: See [`adjust_p_values`].
        alpha: The chance of a false claim that is accepted; 1 - alpha is the confidence of the intervals.
        samples, seed: See [`paired_randomization_test`].

    Raises:
        InputError: If there are fewer than two systems or queries, the queries differ, or a name is unknown.
    """
    names = list(systems)
    if len(names) < 2:
        raise InputError(f"{len(names)} system", where="compare", cure="Give at least two (seeds count as one)")
    _check_same_queries(systems)
    baseline = names[0] if baseline is None else baseline
    if baseline not in systems:
        raise InputError(
            f"there is no system {baseline!r}", where="baseline", cure=f"Choose one of {', '.join(names)}"
        )
    chosen = _common_measures(systems, baseline, measures)
    if all_pairs:
        pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    else:
        pairs = [(baseline, name) for name in names if name != baseline]
    queries = sorted(systems[baseline])
    result = []
    for measure in chosen:
        values = {name: np.array([systems[name][query][measure] for query in queries]) for name in names}
        result += _compare_pairs(measure, values, pairs, correction, alpha, samples, seed)
    return result


def _common_measures(systems: Mapping[str, PerQuery], baseline: str, measures: Sequence[str] | None) -> Sequence[str]:
    """The measures asked for, which all systems must have; by default all that they have, in the baseline's order."""
    common = [name for name in _measures(systems[baseline]) if all(name in _measures(s) for s in systems.values())]
    for measure in measures or ():
        if measure not in common:
            lacking = [name for name in systems if measure not in _measures(systems[name])]
            raise InputError(
                f"{', '.join(lacking)} was not measured by {measure}",
                where="measures",
                cure=f"Choose among {', '.join(common) or '(they have none in common)'}, or measure again",
            )
    return measures or common


def _compare_pairs(
    measure: str,
    values: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    correction: str,
    alpha: float,
    samples: int,
    seed: int,
) -> list[Comparison]:
    """The family of comparisons on one measure; `values` are those of the same queries, `float[n]` each."""
    random = [paired_randomization_test(values[a], values[b], samples=samples, seed=seed) for a, b in pairs]
    student = [paired_t_test(values[a], values[b], confidence=1 - alpha) for a, b in pairs]
    adjusted = adjust_p_values(random, correction)
    adjusted_t = adjust_p_values([test.p_value for test in student], correction)
    result = []
    for number, (a, b) in enumerate(pairs):
        gain = values[b] - values[a]
        result.append(
            Comparison(
                measure=measure,
                baseline=a,
                system=b,
                n_queries=len(gain),
                baseline_mean=float(values[a].mean()),
                system_mean=float(values[b].mean()),
                difference=float(gain.mean()),
                interval=student[number].interval,
                effect_size=student[number].effect_size,
                wins=int((gain > 0).sum()),
                losses=int((gain < 0).sum()),
                ties=int((gain == 0).sum()),
                p_randomization=random[number],
                p_t_test=student[number].p_value,
                p_randomization_adjusted=adjusted[number],
                p_t_test_adjusted=adjusted_t[number],
                significant=adjusted[number] <= alpha,
            )
        )
    return result


def _differences(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> np.ndarray:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"values of shapes {a.shape} and {b.shape}", where="paired test", cure="Give two equal lists")
    if len(a) < 2:
        raise InputError(f"{len(a)} query", where="paired test", cure="A paired test needs at least 2 queries")
    return b - a


def _measures(values: PerQuery) -> Iterable[str]:
    return next(iter(values.values()), {}).keys()


def _check_same_queries(systems: Mapping[str, PerQuery]) -> None:
    (first, mine), *others = systems.items()
    for name, theirs in others:
        stray = sorted(mine.keys() ^ theirs.keys())
        if stray:
            only = first if stray[0] in mine else name
            raise InputError(
                f"{first} was measured on {len(mine)} queries and {name} on {len(theirs)}; {len(stray)} are not "
                f"common to both, for example {stray[0]!r} of {only}",
                where="compare",
                cure="Compare systems on the same collection, split and judgements",
            )
